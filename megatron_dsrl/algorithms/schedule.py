"""Which phase holds at a step.

Steps count from 1 and `until_step` is inclusive: a warm-up of S steps with `until_step: S` updates steps 1..S, as the
paper's indicator I[s > S] says. (The authors' released code switches one step earlier: write S - 1 for that.)
"""

from collections.abc import Sequence

from megatron_dsrl.config.phase import PhaseConfig


class Schedule:
    """Phases in order, each until its last step."""

    def __init__(self, phases: Sequence[PhaseConfig]):
        """Raises ValueError unless `until_step` grows and only the last phase may be open-ended."""
        ends = [phase.until_step for phase in phases]
        if not phases or None in ends[:-1] or any(a >= b for a, b in zip(ends, ends[1:]) if b is not None):
            raise ValueError(f"phases must have growing until_step, null only in the last one; got {ends}")
        self._phases = tuple(phases)

    def at(self, step: int) -> PhaseConfig:
        """The phase of a step (from 1), as it holds at that step.

        Raises:
            ValueError: if the step lies behind the last phase.
        """
        return self._of(step).at(step)

    def begins_phase(self, step: int) -> bool:
        """Whether a step is the first of a phase, and not of the run."""
        return step > 1 and self._of(step) is not self._of(step - 1)

    def _of(self, step: int) -> PhaseConfig:
        assert step >= 1
        for phase in self._phases:
            if phase.until_step is None or step <= phase.until_step:
                return phase
        raise ValueError(f"no phase covers step {step}: the last one ends at {self._phases[-1].until_step}")
