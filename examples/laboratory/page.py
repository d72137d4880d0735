"""Make the page of the results, `results/README.md` and its figures, from the collected files alone.

python -m examples.laboratory.page
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.laboratory import claims
from examples.laboratory.collect import RESULTS
from examples.laboratory.figures import accuracies_by_warmup, gap_charts, over_warmup_chart, write_comparison_figures
from examples.laboratory.paired import paired
from examples.laboratory.results_data import (
    Result,
    SweepResults,
    base_accuracy,
    final_accuracy,
    final_pass_at,
    read_results,
    steps_mean,
)
from megatron_dsrl.analysis.behaviours import BEHAVIOURS
from megatron_dsrl.charts.estimate import Estimate
from megatron_dsrl.charts.figure import write_figure

BASE = "paper_like"
LAST_TEN = (31, 40)
REGISTERED_SEEDS = 5
WINDOWS = (claims.EARLY, claims.AFTER_20, claims.LAST)
IN_WINDOWS = (("transitions", "transitions"), ("reflections", "reflections"))
AT_END = (
    *((name.replace("_", " "), name) for name in BEHAVIOURS),
    ("solved of 16", "solved"),
    ("unsolved of 16", "unsolved"),
    ("truncated", "response/truncated_fraction"),
)
"""Title and key of step figures that the tables show."""
END_NOTE = """\
Means over runs, lowest and highest in brackets; per response, or problems per step. The second table is over steps 38
to 40: the share of responses with each behaviour, the problems whose eight responses are all right or all wrong, and
the share of responses cut at the length limit.
"""
REMEDIED_CELLS = {"hidden, 0": claims.GRPO, "hidden, 8": claims.DSRL}
"""Runs of the map that the remedies are compared with."""
MAP_NOTE = """\
The same as differences, paired by seed. ± is half of Student's 95 % interval, not corrected for their number; the last
row takes every seed of every cell as a value.
"""
REMEDIES_NOTE = """\
Exploratory, where mistakes are hidden: DSRL with a warm-up of 8 of 40 steps, as it is and with a change to the warm-up.
"""
INTRODUCTION = """\
# Results of the laboratory

Made by `python -m examples.laboratory.page` from the files in this folder; do not edit. [The guide](../README.md) says
what was run, [the protocol](../protocol.md) what was fixed before.
"""


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: this one's)")
    folder = parser.parse_args().results
    write_page(folder)
    print(f"written to {folder / 'README.md'}")
    return 0


def write_page(folder: Path) -> None:
    """Write `README.md` and the figures into the folder of the results. Parts without results say so."""
    base_file = folder / f"base_{BASE}.json"
    base = json.loads(base_file.read_text(encoding="utf-8")) if base_file.exists() else None
    comparison = read_results(folder / "comparison.jsonl")
    parts = [
        INTRODUCTION,
        *_base_part(base, folder),
        *_learning_rate_part(read_results(folder / "learning_rate.jsonl")),
        *_comparison_part(comparison, folder),
        *_claims_part(comparison, read_results(folder / "warmup_lengths.jsonl"), base),
        *_warmup_part(read_results(folder / "warmup_lengths.jsonl"), folder),
        *_map_part(read_results(folder / "map.jsonl"), folder),
        *_remedies_part(read_results(folder / "remedies.jsonl"), read_results(folder / "map.jsonl")),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _base_part(base: dict[str, Any] | None, folder: Path) -> list[str]:
    if base is None:
        return ["## The base\n\nNot measured yet.\n"]
    rows = [[condition, "yes" if met else "**no**"] for condition, met in base["conditions"].items()]
    figures = [
        ["Avg@1", f"{100 * base['accuracy']:.1f} %"],
        ["Pass@32", f"{100 * base['pass@32']:.1f} %"],
        ["thoughts per response", f"{base['thoughts']:.3f}"],
        ["tokens per response", f"{base['mean_tokens']:.1f}"],
        ["responses that search", f"{100 * base['searching_responses']:.1f} %"],
        ["accuracy of those that search", f"{100 * base['accuracy_of_searching']:.1f} %"],
        ["accuracy of the others", f"{100 * base['accuracy_of_others']:.1f} %"],
    ]
    if gradients := base.get("gradients"):
        share = f"{100 * gradients['only_the_prompt']:.1f} %"
        figures.append(["tokens that the prompt makes more likely by over 1 nat", share])
        write_figure(gap_charts(gradients), folder / "gaps.svg")
    picture = ["![log-prob gap between the spaces](gaps.svg)\n"] if gradients else []
    return ["## The base\n", table(["condition", "met"], rows), table(["property", "value"], figures), *picture]


def _learning_rate_part(results: SweepResults) -> list[str]:
    rows = []
    for method in results.methods:
        accuracies = [100 * run.mean_of_steps("accuracy", *LAST_TEN) for run in results.of(method)]
        rows.append([method, str(len(accuracies)), _estimate(accuracies)])
    title = "## Learning rate of GRPO\n\nAccuracy on the sampled training problems of steps 31 to 40.\n"
    return [title, table(["learning rate", "runs", "accuracy, %"], rows) if rows else "Not run yet.\n"]


def _comparison_part(results: SweepResults, folder: Path) -> list[str]:
    if not results.results:
        return ["## Comparison\n\nNot run yet: `bash examples/laboratory/run.sh bases comparison`.\n"]
    rows = [["before training", "", _percent(results.of(results.methods[0]), base_accuracy), "", "", ""]]
    rows += [_method_row(results, method) for method in results.methods]
    header = ["method", "seeds", "accuracy, %", f"minus {claims.GRPO}, points", "Pass@64, %", "tokens"]
    pictures = [f"![{title}]({file})\n" for title, file in write_comparison_figures(results, folder)]
    windows = [[method, *_windows(results.of(method))] for method in results.methods]
    in_windows = ["method", *(f"{name}, steps {first}-{last}" for name, _ in IN_WINDOWS for first, last in WINDOWS)]
    at_end = [[method, *_at_end(results.of(method))] for method in results.methods]
    end_header = ["method", *(name for name, _ in AT_END)]
    note = (
        "± is half of Student's 95 % interval over seeds. Differences are paired by seed: mean, 95 % bootstrap "
        "interval over seeds (too narrow for few seeds), and Student's t interval.\n\n"
        f"The protocol registers {REGISTERED_SEEDS} seeds; with fewer, a verdict is preliminary, with one seed "
        f"none is possible. Commits of the runs: {', '.join(results.commits)}.\n"
    )
    tables = [table(header, rows), note, table(in_windows, windows), table(end_header, at_end)]
    return ["## Comparison\n", *tables, END_NOTE, *pictures]


def _windows(runs: Sequence[Result]) -> list[str]:
    return [_short([run.mean_of_steps(key, *window) for run in runs]) for _, key in IN_WINDOWS for window in WINDOWS]


def _at_end(runs: Sequence[Result]) -> list[str]:
    return [_short([run.mean_of_steps(key, *claims.LAST) for run in runs]) for _, key in AT_END]


def _short(values: Sequence[float]) -> str:
    """Mean over runs, with the lowest and the highest; `-` if the runs are too short for it."""
    if not all(map(math.isfinite, values)):
        return "-"
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{spread}"


def _method_row(results: SweepResults, method: str) -> list[str]:
    runs = results.of(method)
    return [
        method,
        str(len(runs)),
        _percent(runs, final_accuracy),
        "" if method == claims.GRPO else _difference(results, method, claims.GRPO),
        _percent(runs, final_pass_at(64)),
        _percent(runs, steps_mean("response/mean_tokens", *claims.LAST)),
    ]


def _difference(results: SweepResults, method: str, baseline: str) -> str:
    """Accuracy of a method minus the baseline's, or nothing if they have no seed in common."""
    common = {run.seed for run in results.of(method)} & {run.seed for run in results.of(baseline)}
    return claims.describe(claims.final_difference(results, method, baseline)) if common else ""


def _claims_part(comparison: SweepResults, lengths: SweepResults, base: dict[str, Any] | None) -> list[str]:
    findings = [
        *(claims.judge(claim, comparison) for claim in claims.CLAIMS),
        *claims.judge_gradients(base.get("gradients") if base else None),
        claims.judge(claims.WARMUP_CLAIM, lengths),
    ]
    rows = [
        [str(one.number), one.paper, one.figure, one.found, str(one.runs), f"**{one.verdict}**"] for one in findings
    ]
    header = ["#", "the paper says", "figure", "found", "n", "verdict"]
    return ["## The paper's claims\n", table(header, rows)]


def _warmup_part(results: SweepResults, folder: Path) -> list[str]:
    if not results.results:
        return ["## Warm-up lengths\n\nNot run yet: `bash examples/laboratory/run.sh bases warmup_lengths`.\n"]
    cells = accuracies_by_warmup(results, lambda method: ("DSRL", int(method)))
    write_figure([over_warmup_chart("Warm-up length, of 60 steps", cells)], folder / "warmup_lengths.svg")
    rows = [
        [method, str(len(results.of(method))), _percent(results.of(method), final_accuracy)]
        for method in results.methods
    ]
    picture = "![accuracy over warm-up length](warmup_lengths.svg)\n"
    return ["## Warm-up lengths\n", table(["warm-up steps", "seeds", "accuracy, %"], rows), picture]


def _map_part(results: SweepResults, folder: Path) -> list[str]:
    if not results.results:
        return ["## The map\n\nNot run yet: `bash examples/laboratory/run.sh bases map`.\n"]
    cells = accuracies_by_warmup(results, _cell_and_length)
    write_figure([over_warmup_chart("Mistakes x restating x warm-up", cells)], folder / "map.svg")
    lengths = sorted({length for of_cell in cells.values() for length in of_cell})
    rows = [[cell, *(_cell_words(of_cell.get(length, [])) for length in lengths)] for cell, of_cell in cells.items()]
    header = ["cell", *(f"warm-up {length}, accuracy, %" for length in lengths)]
    by_cell = {cell: [_gains(results, cell, length) for length in lengths[1:]] for cell in cells}
    by_cell["all cells"] = [tuple(chain.from_iterable(column)) for column in zip(*by_cell.values())]
    gains = [[cell, *map(_gain_words, of_cell)] for cell, of_cell in by_cell.items()]
    gain_header = ["cell", *(f"warm-up {length} minus none, points" for length in lengths[1:])]
    return ["## The map\n", table(header, rows), MAP_NOTE, table(gain_header, gains), "![the map](map.svg)\n"]


def _gains(results: SweepResults, cell: str, length: int) -> tuple[float, ...]:
    """A cell's accuracy with a warm-up minus that without one, by seed."""
    with_warmup, without = (results.by_seed(f"{cell}, {steps}", final_accuracy) for steps in (length, 0))
    return paired(with_warmup, without).values if with_warmup.keys() & without.keys() else ()


def _gain_words(gains: tuple[float, ...]) -> str:
    if not gains:
        return "-"
    estimate = Estimate(gains)
    return f"{estimate.mean:+.1f}" + ("" if estimate.half_width is None else f" ± {estimate.half_width:.1f}")


def _remedies_part(remedies: SweepResults, of_map: SweepResults) -> list[str]:
    title = "## Remedies\n"
    if not remedies.results:
        return [title, "Not run yet: `bash examples/laboratory/run.sh bases map remedies`.\n"]
    compared = [replace(run, method=name) for cell, name in REMEDIED_CELLS.items() for run in of_map.of(cell)]
    results = SweepResults((*compared, *remedies.results))
    rows = [
        [
            method,
            str(len(results.of(method))),
            _percent(results.of(method), final_accuracy),
            *("" if method == other else _difference(results, method, other) for other in (claims.GRPO, claims.DSRL)),
        ]
        for method in results.methods
    ]
    header = ["method", "seeds", "accuracy, %", *(f"minus {one}, points" for one in (claims.GRPO, claims.DSRL))]
    return [title, REMEDIES_NOTE, table(header, rows)]


def _cell_and_length(method: str) -> tuple[str, int]:
    cell, _, length = method.rpartition(", ")
    return cell, int(length)


def _cell_words(values: Sequence[float]) -> str:
    return f"{_estimate(values)} (n = {len(values)})" if values else "-"


def _percent(runs: Sequence[Result], figure: Any) -> str:
    return _estimate([figure(run) for run in runs])


def _estimate(values: Sequence[float]) -> str:
    if not all(map(math.isfinite, values)):
        return "-"
    estimate = Estimate(tuple(values))
    half = estimate.half_width
    return f"{estimate.mean:.1f}" + ("" if half is None else f" ± {half:.1f}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
