"""Time spent per part: mean seconds per step by phase, and the share of the total."""

from collections.abc import Sequence
from statistics import fmean

from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import RunRecords
from megatron_dsrl.report.parts import Table
from megatron_dsrl.report.training_charts import step_parts

WHOLE = "seconds/step"


def time_table(run: RunRecords) -> Table | None:
    """A row per part, the rest as `other`; None when no step has its time."""
    steps = [record for record in run.steps if record.get(WHOLE) is not None]
    if not steps:
        return None
    phases = list(dict.fromkeys(record["phase"] for record in steps))
    by_phase = [[record for record in steps if record["phase"] == phase] for phase in phases]
    parts = step_parts(steps)
    header = ("seconds per step", *phases, *(("all steps",) if len(phases) > 1 else ()), "share")
    columns = [*by_phase, *([steps] if len(phases) > 1 else [])]
    whole = sum(record[WHOLE] for record in steps)
    rows = []
    for part in (*parts, "other", WHOLE):
        share = sum(_seconds(record, part, parts) for record in steps) / whole
        rows.append((_name(part), *(_mean(column, part, parts) for column in columns), f"{100 * share:.0f} %"))
    return Table(header, tuple(rows))


def _mean(records: Sequence[Record], part: str, parts: Sequence[str]) -> str:
    return f"{fmean(_seconds(record, part, parts) for record in records):.2f}"


def _seconds(record: Record, part: str, parts: Sequence[str]) -> float:
    """A part that a step did not have took none of its time."""
    if part == "other":
        return max(0.0, record[WHOLE] - sum(record.get(each) or 0.0 for each in parts))
    return record.get(part) or 0.0


def _name(part: str) -> str:
    return "the whole step" if part == WHOLE else part.removeprefix("seconds/").replace("_", " ")
