"""`provenance.jsonl` read back: which starts made a run, and what they say."""

from collections.abc import Sequence
from pathlib import Path

from megatron_dsrl.observability.records import Record, read_records

PROVENANCE_FILE = "provenance.jsonl"


def read_starts(folder: Path) -> list[Record]:
    """All recorded starts of a folder, oldest first; none for a folder of an earlier version.

    Raises:
        UserError: the file is damaged.
    """
    return read_records(folder / PROVENANCE_FILE)


def steps_of_starts(starts: Sequence[Record], last_step: int) -> list[tuple[int, int] | None]:
    """First and last step of each start that a run consists of; None for a start none of whose steps is left.

    A start that continues from a checkpoint replaces all steps after it.

    Args:
        starts: the recorded starts.
        last_step: last step that the run has recorded.
    """
    spans: list[tuple[int, int] | None] = []
    end = last_step
    for start in reversed(starts):
        after = start.get("after_step") or 0
        spans.append((after + 1, end) if after < end else None)
        end = min(end, after)
    return spans[::-1]
