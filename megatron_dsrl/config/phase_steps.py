"""The phases of a run at each of its steps; custom phases may change at every step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.phase import PhaseConfig


@dataclass(frozen=True)
class PhaseSteps:
    """A phase of the configuration and the steps that it has."""

    name: str
    first_step: int
    """Counted from 1."""
    last_step: int
    """Inclusive; below `first_step` for a phase that the run ends before."""
    forms: tuple[PhaseConfig, ...]
    """The phase at its steps, at least one: what `PhaseConfig.at` gives, the same one once."""

    @property
    def steps(self) -> int:
        """Steps that the run spends in the phase."""
        return max(0, self.last_step - self.first_step + 1)


def phases_by_steps(phases: Sequence[PhaseConfig], steps: int) -> Iterator[PhaseSteps]:
    """Every phase of a run with this many steps, in order.

    Raises:
        UserError: a custom phase fails at one of its steps, or returns something other than a phase.
    """
    first = 1
    for position, phase in enumerate(phases):
        last = steps if phase.until_step is None else min(phase.until_step, steps)
        forms = [_at(phase, step, position) for step in range(first, max(first, last) + 1)]
        yield PhaseSteps(phase.name, first, last, tuple({id(form): form for form in forms}.values()))
        first = max(first, last + 1)


def _at(phase: PhaseConfig, step: int, position: int) -> PhaseConfig:
    try:
        form = phase.at(step)
    except Exception as error:  # the user's own code
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"phases.{position}: {phase.type} fails at step {step}: {what}") from error
    if not isinstance(form, PhaseConfig):
        raise UserError(f"phases.{position}: {phase.type}.at({step}) returned {form!r}, expected a PhaseConfig")
    return form
