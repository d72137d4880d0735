"""Which phase is active at a step.

Steps count from 1 and `until_step` is inclusive: a warm-up with `until_step: S` covers steps 1..S, as in the paper's
indicator I[s > S]. (The authors' released code switches one step earlier; use S - 1 to match it.)
"""

import math
from collections.abc import Sequence

from megatron_dsrl.config.phase import PhaseConfig


class Schedule:
    """Consecutive phases, each up to its last step."""

    def __init__(self, phases: Sequence[PhaseConfig]):
        """Raises ValueError unless `until_step` increases and only the last phase is open-ended."""
        ends = [phase.until_step for phase in phases]
        bounds = [math.inf if end is None else end for end in ends]
        if not phases or any(a >= b for a, b in zip(bounds, bounds[1:])):
            raise ValueError(f"until_step must increase from phase to phase, null only in the last one; got {ends}")
        self._phases = tuple(phases)

    def at(self, step: int) -> PhaseConfig:
        """The phase of a step (from 1), with its options at that step.

        Raises:
            ValueError: the step is after the last phase.
        """
        return self._phase(step).at(step)

    def begins_phase(self, step: int) -> bool:
        """Whether a step is the first of a phase other than the first phase."""
        return step > 1 and self._phase(step) is not self._phase(step - 1)

    def _phase(self, step: int) -> PhaseConfig:
        assert step >= 1
        for phase in self._phases:
            if phase.until_step is None or step <= phase.until_step:
                return phase
        raise ValueError(f"no phase covers step {step}: the last one ends at {self._phases[-1].until_step}")
