"""How a part's process reports its figures: as lines of its output with a prefix."""

import json
import traceback
from collections.abc import Callable, Sequence

FIGURES = "@figures "
PROBLEM = "@problem "

Figures = dict[str, str]


def report_figures(figures: Figures) -> None:
    """Print figures for the record."""
    print(FIGURES + json.dumps(figures), flush=True)


def measure_each(measurements: dict[str, Callable[[], Figures]]) -> int:
    """Do all measurements, even after one has failed; returns the exit status."""
    failed = False
    for name, measure in measurements.items():
        print(f"measuring: {name}", flush=True)
        try:
            report_figures(measure())
        except Exception as error:
            failed = True
            traceback.print_exc()
            first_line = (str(error).splitlines() or [""])[0]
            print(f"{PROBLEM}{name}: {type(error).__name__}: {first_line}", flush=True)
    return 1 if failed else 0


def read_reports(lines: Sequence[str]) -> tuple[Figures, list[str]]:
    """Figures and problems in an output."""
    figures: Figures = {}
    for line in lines:
        if line.startswith(FIGURES):
            figures |= json.loads(line.removeprefix(FIGURES))
    return figures, [line.removeprefix(PROBLEM) for line in lines if line.startswith(PROBLEM)]
