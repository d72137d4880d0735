"""Differences in provenance between the starts of a run, or between runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dsrl.observability.records import Record, read_starts
from megatron_dsrl.provenance.words import NOT_RECORDED, what_computed

ALWAYS_SHOWN = ("Package torch", "Package megatron-core", "Package sglang", "Package transformers")
PACKAGE = "Package "
INPUTS = ("Base model", "Training data")
PROBLEMS = "Problems of "


@dataclass(frozen=True)
class ComparedFact:
    """One thing that may change results, of several runs."""

    name: str
    values: tuple[str, ...]
    """One per run; what changed within a run as `first, then second`."""

    @property
    def differs(self) -> bool:
        """Between runs, or between the starts of one."""
        return len(set(self.values)) > 1 or any(", then " in value for value in self.values)


@dataclass(frozen=True)
class ChangedFact:
    """What was replaced between two starts of a run."""

    name: str
    before: str
    after: str
    from_step: int


def starts_that_count(folder: Path, last_step: int) -> list[Record]:
    """The starts that a run's steps come from; for a run without steps, the last start. Raises like `read_starts`."""
    starts = read_starts(folder)
    spans = steps_of_starts(starts, last_step)
    return [start for start, span in zip(starts, spans, strict=True) if span] or starts[-1:]


def compare_runs(runs: Sequence[Sequence[Record]]) -> list[ComparedFact]:
    """Everything that may change results, of every run; packages other than the main ones only if they differ. `runs`
    has the starts of each that count."""
    said = [[what_computed(start) for start in starts] for starts in runs]
    names = list(dict.fromkeys(name for starts in said for facts in starts for name in facts))
    facts = [ComparedFact(name, tuple(_over_starts(starts, name) for starts in said)) for name in names]
    return [fact for fact in facts if fact.differs or not fact.name.startswith(PACKAGE) or fact.name in ALWAYS_SHOWN]


def changes_between_starts(starts: Sequence[Record]) -> list[ChangedFact]:
    """Differences between a run's start and the previous one, in order. Takes the run's starts that count, oldest
    first."""
    changes = []
    for one, other in zip(starts, starts[1:]):
        before, after = what_computed(one), what_computed(other)
        from_step = (other.get("after_step") or 0) + 1
        changes += [
            ChangedFact(name, before.get(name, NOT_RECORDED), after.get(name, NOT_RECORDED), from_step)
            for name in {**before, **after}
            if before.get(name) != after.get(name)
        ]
    return changes


def changed_inputs(folder: Path, after_step: int) -> list[ChangedFact]:
    """What the newest start, which continues after a step, reads differently from the one that made this step: base
    model, training data, problems of held-out sets."""
    before = starts_that_count(folder, after_step)[-1:]
    changes = changes_between_starts([*before, *read_starts(folder)[-1:]])
    inputs = [change for change in changes if change.name in INPUTS or change.name.startswith(PROBLEMS)]
    return [change for change in inputs if NOT_RECORDED not in (change.before, change.after)]  # such as a new set


def _over_starts(starts: Sequence[dict[str, str]], name: str) -> str:
    values = [facts.get(name, NOT_RECORDED) for facts in starts] or [NOT_RECORDED]
    changed = [value for index, value in enumerate(values) if index == 0 or value != values[index - 1]]
    return ", then ".join(changed)


def steps_of_starts(starts: Sequence[Record], last_step: int) -> list[tuple[int, int] | None]:
    """First and last step of each start that a run consists of; None for a start without remaining steps.

    A start that continues from a checkpoint replaces all steps after it. `last_step` is the last one that the run has
    recorded.
    """
    spans: list[tuple[int, int] | None] = []
    end = last_step
    for start in reversed(starts):
        after = start.get("after_step") or 0
        spans.append((after + 1, end) if after < end else None)
        end = min(end, after)
    return spans[::-1]
