"""One line per run: speed, staleness, idle engines, and the reward. `python -m examples.asynchronous.table RUN...`."""

import json
import sys
from pathlib import Path
from statistics import fmean

PART = 10
"""Steps whose rewards are averaged."""


def main(runs: list[Path]) -> None:
    """Print the table."""
    ends = range(PART, 1 + min(len(records(run)) for run in runs), PART)
    columns = ["run", "steps per hour", "waiting for samples", "engine idle", "staleness, mean"]
    columns += [f"reward, {end - PART + 1} to {end}" for end in ends]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for run in runs:
        steps = records(run)
        rest = steps[1:]  # the first step waits for the first samples in every run
        hours = (steps[-1]["time"] - steps[0]["time"]) / 3600
        cells = [
            run.name,
            f"{len(rest) / hours:,.0f}",
            f"{sum(step['seconds/generate'] for step in rest) / hours / 36:.0f} %",
            f"{100 * fmean(step['engine/idle_fraction'] for step in rest):.0f} %",
            f"{fmean(step.get('asynchronous/mean_staleness', 0.0) for step in rest):.2f}",
            *(f"{fmean(step['reward/mean'] for step in steps[end - PART : end]):.3f}" for end in ends),
        ]
        print(f"| {' | '.join(cells)} |")


def records(run: Path) -> list[dict[str, float]]:
    """The run's steps."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
