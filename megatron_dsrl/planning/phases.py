"""The phases that a run reaches, and the models they need in addition to the policy."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dsrl.algorithms.advantage_estimation import phase_passes
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig


@dataclass(frozen=True)
class OtherModels:
    """Models beside the policy, which exist only where a phase of the run needs them."""

    critic: bool
    reference: bool


def phases_of(config: RunConfig) -> Iterator[tuple[PhaseConfig, int]]:
    """Every phase that the run reaches, and its number of steps."""
    done = 0
    for phase in config.phases:
        last = config.steps if phase.until_step is None else min(phase.until_step, config.steps)
        if last > done:
            yield phase, last - done
            done = last


def other_models(config: RunConfig) -> OtherModels:
    """The models that `run_models.build_models` builds in addition to the policy."""
    passes = [phase_passes(phase) for phase, _ in phases_of(config)]
    return OtherModels(
        critic=any(needed.values for needed in passes), reference=any(needed.reference_log_probs for needed in passes)
    )
