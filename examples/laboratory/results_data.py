"""The collected runs of a sweep, and figures by method and seed. Reads only `results/`; no run folders."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_dsrl.observability.records import Record, read_records

BySeed = dict[int, float]
BASE = "base"
"""Name under which the figures before training are kept."""


@dataclass(frozen=True)
class Result:
    """One collected run."""

    method: str
    seed: int
    commit: str
    phases: tuple[tuple[str, int, int], ...]
    """Name, first and last step."""
    evaluations: tuple[Record, ...]
    steps: tuple[Record, ...]

    @property
    def before(self) -> Record:
        """Evaluation before training."""
        return self.evaluations[0]

    @property
    def after(self) -> Record:
        """Evaluation after the last step."""
        return self.evaluations[-1]

    def mean_of_steps(self, key: str, first: int, last: int) -> float:
        """Mean of a step figure over the steps first..last; not a number if the run is shorter."""
        values = [record[key] for record in self.steps if first <= record["step"] <= last]
        return fmean(values) if values else math.nan


@dataclass(frozen=True)
class SweepResults:
    """All collected runs of a sweep."""

    results: tuple[Result, ...]

    @property
    def methods(self) -> list[str]:
        """Methods with a run, in the order of the sweep file."""
        return list(dict.fromkeys(result.method for result in self.results))

    @property
    def commits(self) -> list[str]:
        """Commits that made the runs."""
        return list(dict.fromkeys(result.commit for result in self.results))

    def of(self, method: str) -> list[Result]:
        """Runs of a method."""
        return [result for result in self.results if result.method == method]

    def by_seed(self, method: str, figure: Callable[[Result], float]) -> BySeed:
        """A figure of every run of a method, by seed."""
        return {result.seed: figure(result) for result in self.of(method)}

    def curve(self, method: str, key: str) -> list[tuple[int, list[float]]]:
        """Values of a step figure over the runs of a method, at every step."""
        columns: dict[int, list[float]] = {}
        for result in self.of(method):
            for record in result.steps:
                if record.get(key) is not None:
                    columns.setdefault(record["step"], []).append(record[key])
        return sorted(columns.items())


def read_results(file: Path) -> SweepResults:
    """The runs in a file of `collect`; none if it is missing."""
    return SweepResults(tuple(_result(record) for record in read_records(file)))


def final_accuracy(result: Result) -> float:
    """Held-out accuracy after the last step, in percent."""
    return 100 * result.after["accuracy"]


def base_accuracy(result: Result) -> float:
    """Held-out accuracy before training, in percent."""
    return 100 * result.before["accuracy"]


def final_pass_at(k: int) -> Callable[[Result], float]:
    """Held-out Pass@k after the last step, in percent; not a number if fewer samples were taken."""
    return lambda result: 100 * (result.after.get(f"pass@{k}", math.nan) if k > 1 else result.after["accuracy"])


def steps_mean(key: str, first: int, last: int) -> Callable[[Result], float]:
    """Mean of a step figure over steps first..last."""
    return lambda result: result.mean_of_steps(key, first, last)


def growth(key: str, early: tuple[int, int], late: tuple[int, int]) -> Callable[[Result], float]:
    """How many times as large a step figure is in the late steps; infinite after zero."""

    def ratio(result: Result) -> float:
        before = result.mean_of_steps(key, *early)
        return result.mean_of_steps(key, *late) / before if before else float("inf")

    return ratio


def pass_at_budgets(results: Sequence[Result]) -> list[int]:
    """Numbers of samples K for which Pass@K was measured."""
    return sorted(int(key.removeprefix("pass@")) for key in results[0].after if key.startswith("pass@"))


def _result(record: Mapping) -> Result:
    columns = record["steps"]
    return Result(
        record["method"],
        record["seed"],
        record["commit"],
        tuple((name, first, last) for name, first, last in record["phases"]),
        tuple(record["evaluations"]),
        tuple(dict(zip(columns, row)) for row in zip(*columns.values())),
    )
