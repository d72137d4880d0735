"""Which phase is active at a step, and which model passes its objectives need before advantages can be computed.

Steps count from 1 and `until_step` is inclusive: a warm-up with `until_step: S` covers steps 1..S, as in the paper's
indicator I[s > S]. (The authors' released code switches one step earlier; use S - 1 to match it.)

The training loop runs the passes on the experience and fills the fields of the same names. (It also computes the old
log-probs of what is trained on, for the loss ratio and the importance correction, if the update has more than one step;
with one step they are the current ones.)
"""

import math
from collections.abc import Sequence

from megatron_dsrl.algorithms.experience import ModelPasses
from megatron_dsrl.config.phase import ObjectiveConfig, PhaseConfig, phases_by_steps


class Schedule:
    """Consecutive phases, each up to its last step."""

    def __init__(self, phases: Sequence[PhaseConfig]) -> None:
        """Raises ValueError unless `until_step` increases and only the last phase is open-ended."""
        ends = [phase.until_step for phase in phases]
        bounds = [math.inf if end is None else end for end in ends]
        if not phases or any(a >= b for a, b in zip(bounds, bounds[1:])):
            raise ValueError(f"until_step must increase from phase to phase, null only in the last one; got {ends}")
        self._phases = tuple(phases)

    def at(self, step: int) -> PhaseConfig:
        """The phase of a step (from 1), with its options at that step. Raises ValueError after the last phase."""
        return self._phase(step).at(step)

    def starts_phase(self, step: int) -> bool:
        """Whether a step is the first of a phase other than the first phase."""
        return step > 1 and self._phase(step) is not self._phase(step - 1)

    def _phase(self, step: int) -> PhaseConfig:
        assert step >= 1
        for phase in self._phases:
            if phase.until_step is None or step <= phase.until_step:
                return phase
        raise ValueError(f"no phase covers step {step}: the last one ends at {self._phases[-1].until_step}")


def required_passes(objective: ObjectiveConfig) -> ModelPasses:
    """Fields that an objective's experience needs before `with_advantages`."""
    penalised = objective.kl is not None and objective.kl.reward_coefficient > 0
    kl_passes = ModelPasses(old_log_probs=penalised, reference_log_probs=objective.kl is not None)
    return kl_passes | objective.advantage.needs


def passes_of_run(phases: Sequence[PhaseConfig], steps: int) -> ModelPasses:
    """The union of what the phases need at a run's steps. `values` takes a critic, `reference_log_probs` a reference
    policy. Raises UserError like `phases_by_steps`."""
    needed = ModelPasses()
    for phase in phases_by_steps(phases, steps):
        for form in phase.forms if phase.steps else ():
            needed |= passes_of_phase(form)
    return needed


def passes_of_phase(phase: PhaseConfig) -> ModelPasses:
    """The union of what a phase's objectives need."""
    needed = ModelPasses()
    for objective in phase.objectives.values():
        needed |= required_passes(objective)
    return needed
