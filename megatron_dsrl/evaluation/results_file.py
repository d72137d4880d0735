"""`results.json` of an evaluation, read back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dsrl.common.errors import UserError

RESULTS_FILE = "results.json"
EVALUATIONS_FOLDER = "evaluation"
"""In a run folder, for evaluations of the run's own policies."""

Summary = Mapping[str, Any]
"""Title, settings and figures of one benchmark; see `results.write_results`."""

_NEEDED = ("title", "accuracy", "problems", "samples_per_prompt", "pass_at_k")


@dataclass(frozen=True)
class EvaluationResults:
    """What `dsrl eval` found."""

    folder: Path
    model: str
    """Folder or hub name of what was evaluated."""
    step: int | None
    """Of the run that trained the model; None where that is unknown."""
    benchmarks: dict[str, Summary]
    """By the benchmark's name."""

    def pass_at_k(self, benchmark: str) -> dict[int, float]:
        """By K, ascending."""
        values = self.benchmarks[benchmark]["pass_at_k"]
        return dict(sorted((int(k), value) for k, value in values.items()))


def read_results(folder: Path) -> EvaluationResults:
    """
    Raises:
        UserError: the folder holds no results of `dsrl eval`.
    """
    file = folder / RESULTS_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        benchmarks = dict(data["benchmarks"])
        missing = [f"{name}: {key}" for name, summary in benchmarks.items() for key in _NEEDED if key not in summary]
        if missing:
            raise KeyError(missing[0])
        return EvaluationResults(folder, str(data["model"]), data.get("step"), benchmarks)
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no {RESULTS_FILE}: give an output folder of `dsrl eval`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} does not hold the results of `dsrl eval` ({error!r})") from error


def results_of_run(run_folder: Path) -> list[EvaluationResults]:
    """All evaluations in a run folder, by step; those of unknown steps first.

    Raises:
        UserError: one of them is damaged.
    """
    root = run_folder / EVALUATIONS_FOLDER
    folders = sorted({file.parent for pattern in ("", "*/") for file in root.glob(pattern + RESULTS_FILE)})
    return sorted(map(read_results, folders), key=lambda results: -1 if results.step is None else results.step)


def newest_results(folder: Path) -> EvaluationResults:
    """Of an output folder of `dsrl eval`; of a run folder the evaluation of its latest policy.

    Raises:
        UserError: there are none, or they are damaged.
    """
    if not (folder / RESULTS_FILE).is_file() and (of_run := results_of_run(folder)):
        return of_run[-1]
    return read_results(folder)
