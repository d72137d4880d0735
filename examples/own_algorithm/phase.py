"""A custom phase with settings that change at every step.

It is a section of the configuration like every phase, with additional fields, and is named by the dotted path in its
`type`. The training loop calls its `at(step)`.
"""

from pydantic import Field

from megatron_dsrl.config.phase import AdditionalObjectiveConfig, PhaseConfig


class FadingPhase(PhaseConfig):
    """A phase with a second objective that fades away: DSRL's switch from one space to the other, made gradual.

    The coefficient of `fading` falls linearly: whole at step 1, zero from step `fading_steps + 1` of the run on.
    """

    fading: AdditionalObjectiveConfig
    """The objective that fades away."""

    fading_steps: int = Field(ge=1)
    """Steps in which it counts."""

    def at(self, step: int) -> PhaseConfig:
        share = 1 - (step - 1) / self.fading_steps
        if share <= 0:
            return self
        fading = self.fading.model_copy(update={"coefficient": share * self.fading.coefficient})
        return self.model_copy(update={"additional_objectives": [*self.additional_objectives, fading]})
