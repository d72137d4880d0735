"""Pass@K curves of several evaluations in one figure: one chart per benchmark, one curve per evaluation.

The values are those of each evaluation's `results.json`, unbiased estimates that are means over problems.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_dsrl.errors import UserError
from megatron_dsrl.observability.charts import SERIES_COLOURS, Chart, Series, line_chart
from megatron_dsrl.observability.records import Record

PassAtK = Mapping[int, float]
"""By K, ascending."""


def read_pass_at_k(folder: Path) -> dict[str, tuple[str, PassAtK]]:
    """Title and Pass@K of every benchmark of an evaluation, by its name.

    Raises:
        UserError: the folder holds no results of `dsrl eval`.
    """
    file = folder / "results.json"
    try:
        benchmarks = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
        return {
            name: (summary["title"], dict(sorted((int(k), value) for k, value in summary["pass_at_k"].items())))
            for name, summary in benchmarks.items()
        }
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no results.json: give the output folder of `dsrl eval`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} does not hold the results of `dsrl eval` ({error!r})") from error


def records(evaluations: Mapping[str, Mapping[str, tuple[str, PassAtK]]]) -> list[Record]:
    """One record per benchmark, evaluation and K."""
    return [
        {"benchmark": name, "evaluation": label, "k": k, "pass_at_k": value}
        for label, benchmarks in evaluations.items()
        for name, (_, values) in benchmarks.items()
        for k, value in values.items()
    ]


def table(evaluations: Mapping[str, Mapping[str, tuple[str, PassAtK]]]) -> str:
    """Markdown: a row per benchmark and evaluation, Pass@K in percent; an empty cell where a K was not estimated."""
    every_k = sorted({record["k"] for record in records(evaluations)})
    lines = [["benchmark", "evaluation", *(f"Pass@{k}" for k in every_k)], ["---"] * (2 + len(every_k))]
    for name in _names(evaluations):
        for label, benchmarks in evaluations.items():
            if name in benchmarks:
                title, values = benchmarks[name]
                lines.append([title, label, *(f"{100 * values[k]:.1f}" if k in values else "" for k in every_k)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def charts(evaluations: Mapping[str, Mapping[str, tuple[str, PassAtK]]]) -> list[Chart]:
    """A chart per benchmark over log2 K; only powers of two have a place on it.

    Raises:
        UserError: there are more evaluations than colours.
    """
    if len(evaluations) > SERIES_COLOURS:
        raise UserError(f"one figure shows at most {SERIES_COLOURS} evaluations, given {len(evaluations)}")
    return [_chart(name, evaluations) for name in _names(evaluations)]


def _chart(name: str, evaluations: Mapping[str, Mapping[str, tuple[str, PassAtK]]]) -> Chart:
    series, title = [], name
    for colour, (label, benchmarks) in enumerate(evaluations.items(), start=1):
        if name in benchmarks:
            title, values = benchmarks[name]
            powers = {k.bit_length() - 1: value for k, value in values.items() if k & (k - 1) == 0}
            series.append(Series(label, tuple(powers), tuple(powers.values()), colour))
    return line_chart(f"{title}: Pass@K by log2 K", "Unbiased estimate, mean over problems.", series, top=1.0)


def _names(evaluations: Mapping[str, Mapping[str, tuple[str, PassAtK]]]) -> Sequence[str]:
    return list(dict.fromkeys(name for benchmarks in evaluations.values() for name in benchmarks))
