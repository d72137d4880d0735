"""Closing lines of a finished run: its results, its folder, and what to do next."""

from collections.abc import Iterator
from pathlib import Path

from megatron_dsrl.observability.records import EVALUATION_FILE, Record, read_records


def closing_lines(run_folder: Path, steps: int) -> list[str]:
    """Closing lines for a run whose last step is `steps`, with the accuracies in its evaluation.jsonl."""
    return [
        f"{run_folder} is complete: {steps} steps",
        *_accuracies(read_records(run_folder / EVALUATION_FILE)),
        f"next: dsrl report {run_folder}    one HTML page: curves, seconds, samples",
        f"      dsrl samples {run_folder}   responses to read",
    ]


def _accuracies(records: list[Record]) -> Iterator[str]:
    """A line per held-out set, from its first evaluation to its last."""
    for name in dict.fromkeys(record["set"] for record in records):
        accuracies = [record for record in records if record["set"] == name and record.get("accuracy") is not None]
        if not accuracies:
            continue
        first, last = accuracies[0], accuracies[-1]
        if first["step"] == last["step"]:
            yield f"{name}: {last['accuracy']:.1%} after step {last['step']}"
        else:
            before, after = (f"{record['accuracy']:.1%} (step {record['step']})" for record in (first, last))
            yield f"{name}: {before} -> {after}"
