"""Download, in one process, all that a run and the evaluation of its policy read: `dsrl fetch`.

Afterwards it is in the hub's cache. The ranks find it there instead of all asking the hub at once, and so do machines
without a network that share the cache.
"""

from collections.abc import Sequence

from megatron_dsrl.config.benchmark import load_benchmark
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.evaluation.evaluate import read_problems
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.run.inputs import load_inputs


def fetch(config: RunConfig, benchmarks: Sequence[str]) -> str:
    """Read models, tokenizer, prompts and problems, which downloads those that are missing.

    Args:
        benchmarks: names of benchmarks, or paths of their YAML files.

    Returns:
        One line that says what was read.

    Raises:
        UserError: something cannot be downloaded or read, or does not fit the configuration.
    """
    chosen = [load_benchmark(name, data_folder=None) for name in benchmarks]
    inputs = load_inputs(config)
    if config.critic.path is not None:
        resolve_model_folder(config.critic.path, "critic.path")
    problems = read_problems(inputs.model_folder, chosen)
    sets = {"prompts": inputs.prompts} | {s.name: prompts for s, prompts in inputs.evaluation_sets} | problems
    counts = ", ".join(f"{len(prompts)} {name}" for name, prompts in sets.items())
    return f"model {inputs.model_folder}; {counts}"
