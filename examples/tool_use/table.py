"""Runs side by side, one line per evaluation. `python -m examples.tool_use.table RUN...`."""

import sys
from pathlib import Path
from statistics import fmean

from megatron_dsrl.analysis.responses import read_responses
from megatron_dsrl.observability.records import read_records

CALL = "<tool>"
"""Occurs in responses that call the tool, or try to."""


def main(runs: list[Path]) -> None:
    """Print held-out accuracy (greedy), and reward and calls of the step's samples. Step 0 has no samples."""
    steps = sorted(set.intersection(*({record["step"] for record in evaluations(run)} for run in runs)))
    columns = {f"{run.name}: {title}": cells for run in runs for title, cells in columns_of(run).items()}
    print("| step |", " | ".join(columns), "|")
    print("|---" * (1 + len(columns)) + "|")
    for step in steps:
        print(f"| {step} |", " | ".join(cells.get(step, "") for cells in columns.values()), "|")


def columns_of(run: Path) -> dict[str, dict[int, str]]:
    """Cells by title and step."""
    responses = dict(read_responses(run))
    return {
        "held-out": {record["step"]: f"{100 * record['accuracy']:.1f} %" for record in evaluations(run)},
        "reward": {step: f"{fmean(each.reward for each in found):.2f}" for step, found in responses.items()},
        "calls": {
            step: f"{100 * fmean(CALL in each.text for each in found):.0f} %" for step, found in responses.items()
        },
    }


def evaluations(run: Path) -> list[dict[str, float]]:
    """The run's evaluations."""
    return read_records(run / "evaluation.jsonl")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
