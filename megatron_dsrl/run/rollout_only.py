"""The rollout half of a run, without its trainer: `dsrl rollout`.

Samples what the run's steps would sample if its weights never changed, and records it as a run does. With
`rollout.replay_from` another run can then train on it without engines, so each half can be tested alone. The samples
have weight version 0, so that a replay uses their engine log-probs as the old ones.
"""

import time
from contextlib import ExitStack
from pathlib import Path

from megatron_dsrl.common.collective import on_first, rank
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.folder_lock import locked
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.mixture import build_sampler
from megatron_dsrl.model.parallel import process_group
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.run_engines import awaiting_engines
from megatron_dsrl.rollout.recording import rollout_file, write_groups
from megatron_dsrl.rollout.sample import count_tokens
from megatron_dsrl.rollout.step_sampling import sample_round
from megatron_dsrl.run.folder import record_run_start
from megatron_dsrl.run.inputs import RunInputs, load_inputs
from megatron_dsrl.run.rollout_metrics import rollout_metrics


def sample_run(config: RunConfig) -> None:
    """Sample all steps of a run with the weights of its model folder. All ranks call it.

    Steps that are already on disk are skipped. Raises UserError if the model has no weights in Hugging Face format,
    another process is using the run folder, or an input is missing or invalid.
    """
    inputs = load_inputs(config)
    if config.model.random_init or not any(inputs.model_folder.glob("*.safetensors")):
        raise UserError(f"model.path: {inputs.model_folder} has no safetensors files for the engines to read")
    with process_group(), ExitStack() as resources:
        resources.enter_context(locked(inputs.run_folder, print))
        if not on_first(lambda: missing_steps(inputs.run_folder, config.steps)):
            return
        record_run_start("rollout", config, inputs, 0, print)
        rollout = EngineRollout(config, inputs.run_folder, inputs.stop_token_ids, inputs.decode, encode=inputs.encode)
        resources.callback(rollout.close)
        with awaiting_engines(config, inputs.run_folder):
            rollout.wait_until_ready()
        rollout.while_sampling(lambda: sample_steps(config, inputs, rollout), recover=rollout.restart_engines)


def missing_steps(run_folder: Path, steps: int) -> list[int]:
    """Steps whose samples are not on disk yet."""
    return [step for step in range(1, steps + 1) if not rollout_file(run_folder, step).exists()]


def sample_steps(config: RunConfig, inputs: RunInputs, rollout: EngineRollout) -> None:
    """Rank 0: one batch per step, each on disk before the next begins."""
    assert rank() == 0
    sampler = build_sampler(config.data, inputs.prompts, config.seed)
    missing = missing_steps(inputs.run_folder, config.steps)
    for step in range(1, config.steps + 1):
        prompts = [inputs.prompts[i] for i in sampler.next(config.rollout.prompts_per_step)]
        file = rollout_file(inputs.run_folder, step)
        if step not in missing:
            continue
        started = time.perf_counter()
        groups = sample_round(config, rollout, step, 0, prompts)
        metrics = rollout_metrics(groups, count_tokens(groups), time.perf_counter() - started)
        write_groups(file, groups)
        print(
            f"step {step}/{config.steps}  reward {metrics['reward/mean']:.3f}  "
            f"len {metrics['response/mean_tokens']:.0f}  {metrics['throughput/tokens_per_second']:,.0f} tokens/s",
            flush=True,
        )
