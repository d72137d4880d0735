"""Read once, in one process, what a run and the evaluation of its policy read: `dsrl fetch`.

What comes from the hub is in its cache afterwards. There all ranks find it, which would otherwise ask the hub at the
same time, and machines without a network, should they share the cache.
"""

from collections.abc import Sequence

from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.evaluation.benchmark import load_benchmark
from megatron_dsrl.evaluation.evaluate import read_problems
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.run.inputs import load_inputs


def fetch(config: RunConfig, benchmarks: Sequence[str]) -> str:
    """Models, tokenizer, prompts and problems.

    Args:
        benchmarks: names, or paths of YAML files.

    Returns:
        What there is now, in one line.

    Raises:
        UserError: something cannot be had, or does not fit.
    """
    chosen = [load_benchmark(name, data_folder=None) for name in benchmarks]
    inputs = load_inputs(config)
    if config.critic.path is not None:
        resolve_model_folder(config.critic.path, "critic.path")
    problems = read_problems(inputs.model_folder, chosen)
    sets = {"prompts": inputs.prompts} | {s.name: prompts for s, prompts in inputs.evaluation_sets} | problems
    counts = ", ".join(f"{len(prompts)} {name}" for name, prompts in sets.items())
    return f"model {inputs.model_folder}; {counts}"
