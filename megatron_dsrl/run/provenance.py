"""What a run's record of its start says about its own model, data and layout."""

from collections.abc import Callable

from megatron_dsrl.common.collective import rank
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.provenance.differences import changed_inputs
from megatron_dsrl.provenance.inputs import describe_model, describe_prompts, describe_training_sets
from megatron_dsrl.provenance.start import Details, record_start
from megatron_dsrl.rewards.registry import describe_verifiers
from megatron_dsrl.run.inputs import RunInputs


def record_run_start(
    command: str, config: RunConfig, inputs: RunInputs, after_step: int, report: Callable[[str], None]
) -> None:
    """Record a start of `dsrl train` or `dsrl rollout` in the run folder, and report how verifiers run. Collective.

    Args:
        command: `train` or `rollout`.
        inputs: what the run has read.
        after_step: the checkpoint's step that the run continues after; 0 from the beginning.
        report: called on rank 0 with a line on a verifier that depends on the machine, and with a warning if there can
            be no record, or if the run continues with another model or other data under the same path.
    """
    held_out = (evaluation_set.reward for evaluation_set in config.evaluation.sets)
    rewards = [config.reward, *config.data.set_rewards.values(), *held_out]
    verifiers = describe_verifiers(rewards) if rank() == 0 else []
    for line in verifiers:
        report(line)
    details: Details = {
        "after_step": lambda: after_step,
        "layout": lambda: config.parallel.model_dump(mode="json"),
        "engine_tensor_parallel_size": lambda: config.engine.tensor_parallel_size,
        "model": lambda: describe_model(config.model.path, inputs.model_folder),
        "data": lambda: describe_training_sets(config.data, inputs.prompts),
        "evaluation_sets": lambda: {
            one.name: describe_prompts(one, prompts) for one, prompts in inputs.evaluation_sets
        },
        "verifiers": lambda: verifiers,
    }
    record_start(inputs.run_folder, command, details, report)
    if after_step > 0 and rank() == 0:
        for change in changed_inputs(inputs.run_folder, after_step):
            report(
                f"warning: the steps up to {after_step} had another input; {change.name}: {change.before} then, "
                f"{change.after} now"
            )
