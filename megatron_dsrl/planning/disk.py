"""Checkpoints and exported policies of a run, the largest files that it leaves on disk."""

from dataclasses import dataclass

from megatron_dsrl.algorithms.schedule import passes_of_run
from megatron_dsrl.config.due import Due
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.memory import adam_bytes, element_bytes
from megatron_dsrl.planning.parameters import (
    adapter_parameters_of_stage,
    parameters_of_critic_stage,
    parameters_of_model,
)

WHOLE = ParallelConfig()
"""One process has the whole model."""


@dataclass(frozen=True)
class RunFiles:
    """Number and size of the files at the end of a run. Unit: bytes."""

    checkpoints: int
    """Those that are kept, and the next one, which is written before the oldest is removed."""
    checkpoint_bytes: int
    exports: int
    export_bytes: int


def run_files(config: RunConfig, architecture: Architecture) -> RunFiles:
    """Checkpoints and exports of a whole run. Samples and logs are not counted."""
    due, element = Due(config.checkpoint, config.evaluation, config.steps), element_bytes(config.model)
    steps = range(1, config.steps + 1)
    saved = [step for step in steps if due.save(step)]
    keep_every = config.checkpoint.keep_every_steps
    always = sum(keep_every is not None and step % keep_every == 0 for step in saved)
    trained = parameters_of_model(architecture)
    if config.actor.lora:
        trained = adapter_parameters_of_stage(architecture, WHOLE, 0, config.actor.lora).total
    if passes_of_run(config.phases, config.steps).values:
        trained += parameters_of_critic_stage(architecture, WHOLE, 0).total
    return RunFiles(
        checkpoints=min(len(saved), config.checkpoint.keep_last + always + 1),
        checkpoint_bytes=trained * (element + adam_bytes(config.model)),
        exports=sum(due.export(step) for step in steps),
        export_bytes=parameters_of_model(architecture) * element,
    )
