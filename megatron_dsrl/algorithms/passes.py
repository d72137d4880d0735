"""Which passes of a model an objective needs before its advantages can be computed.

The training loop makes them on the built experience and fills the fields of the same names. (The log-probs that the
loss's ratio and an importance correction take are the actor's own business: it makes that pass only where the update
has more than one step, and otherwise uses those of the step itself.)
"""

from dataclasses import dataclass

from megatron_dsrl.config.phase import ObjectiveConfig, PhaseConfig


@dataclass(frozen=True)
class ModelPasses:
    """Fields of an `Experience` that are needed."""

    old_log_probs: bool = False
    """Of the policy before the update."""
    reference_log_probs: bool = False
    """Of the reference policy."""
    values: bool = False
    """Of the critic."""

    def __or__(self, other: "ModelPasses") -> "ModelPasses":
        """What either needs."""
        return ModelPasses(
            self.old_log_probs or other.old_log_probs,
            self.reference_log_probs or other.reference_log_probs,
            self.values or other.values,
        )


def required_passes(objective: ObjectiveConfig) -> ModelPasses:
    """What must be in an objective's experience before `with_advantages`."""
    penalised = objective.kl is not None and objective.kl.reward_coefficient > 0
    of_kl = ModelPasses(old_log_probs=penalised, reference_log_probs=objective.kl is not None)
    return of_kl | objective.advantage.needs


def phase_passes(phase: PhaseConfig) -> ModelPasses:
    """What any of a phase's objectives needs."""
    needed = ModelPasses()
    for objective in phase.objectives.values():
        needed |= required_passes(objective)
    return needed
