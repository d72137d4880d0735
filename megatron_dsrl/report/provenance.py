"""Provenance of a run for the page: every start, the last one in full, and what changed in between."""

from dataclasses import dataclass

from megatron_dsrl.observability.records import read_starts
from megatron_dsrl.observability.run_records import RunRecords
from megatron_dsrl.provenance import differences, words
from megatron_dsrl.report.parts import Table


@dataclass(frozen=True)
class ShownProvenance:
    """The block of one run."""

    starts: Table
    changes: Table | None
    """Differences between the starts that produced the run's steps; None if they agree."""
    last: list[tuple[str, str]]
    """Everything that the last start says, by name."""


def shown_provenance(run: RunRecords) -> ShownProvenance | None:
    """None for a run without records of its starts.

    Raises:
        UserError: the records are damaged.
    """
    starts = read_starts(run.folder)
    if not starts:
        return None
    rows = []
    for start, span in zip(starts, differences.steps_of_starts(starts, _last_step(run)), strict=True):
        rows.append((
            words.start_time(start),
            f"{span[0]} to {span[1]}" if span else "none",
            words.commit_words(start),
            str(start.get("world_size", "")),
            words.device_words(start.get("device") or {}),
            ", ".join(start.get("hosts") or []),
            words.slurm_words(start.get("slurm")),
        ))  # fmt: skip
    changes = differences.changes_between_starts(differences.starts_that_count(run.folder, _last_step(run)))
    return ShownProvenance(
        starts=Table(("Started", "Steps", "Commit", "Processes", "Device", "Hosts", "SLURM"), tuple(rows)),
        changes=Table(
            ("Changed", "Before", "After", "From step"),
            tuple((one.name, one.before, one.after, str(one.from_step)) for one in changes),
        )
        if changes
        else None,
        last=list({**words.where_it_ran(starts[-1]), **words.what_computed(starts[-1])}.items()),
    )


def compared_provenance(runs: list[RunRecords]) -> list[differences.ComparedFact]:
    """Provenance of several runs; empty if none has a record."""
    starts = [differences.starts_that_count(run.folder, _last_step(run)) for run in runs]
    return differences.compare_runs(starts) if any(starts) else []


def _last_step(run: RunRecords) -> int:
    return run.steps[-1]["step"] if run.steps else 0
