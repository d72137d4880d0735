"""Which model passes an objective needs before its advantages can be computed.

The training loop runs them on the experience and fills the fields of the same names. (The actor itself computes the old
log-probs for the loss ratio and the importance correction, and only if the update has more than one step; with one step
they are the current ones.)
"""

from dataclasses import dataclass

from megatron_dsrl.config.phase import ObjectiveConfig, PhaseConfig


@dataclass(frozen=True)
class ModelPasses:
    """The fields of `Experience` that need a model pass."""

    old_log_probs: bool = False
    """Log-probs under the policy before the update."""
    reference_log_probs: bool = False
    """Log-probs under the reference policy."""
    values: bool = False
    """Values of the critic."""

    def __or__(self, other: "ModelPasses") -> "ModelPasses":
        """The union of both."""
        return ModelPasses(
            self.old_log_probs or other.old_log_probs,
            self.reference_log_probs or other.reference_log_probs,
            self.values or other.values,
        )


def required_passes(objective: ObjectiveConfig) -> ModelPasses:
    """Fields that an objective's experience needs before `with_advantages`."""
    penalised = objective.kl is not None and objective.kl.reward_coefficient > 0
    kl_passes = ModelPasses(old_log_probs=penalised, reference_log_probs=objective.kl is not None)
    return kl_passes | objective.advantage.needs


def phase_passes(phase: PhaseConfig) -> ModelPasses:
    """The union of what a phase's objectives need."""
    needed = ModelPasses()
    for objective in phase.objectives.values():
        needed |= required_passes(objective)
    return needed
