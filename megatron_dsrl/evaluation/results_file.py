"""Reading `results.json` of evaluations."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dsrl.common.errors import UserError

RESULTS_FILE = "results.json"
EVALUATIONS_FOLDER = "evaluation"
"""Folder in a run folder for evaluations of the run's policies."""

Summary = Mapping[str, Any]
"""Title, settings and results of one benchmark; see `results.write_results`."""

_NEEDED = ("title", "accuracy", "problems", "samples_per_prompt", "pass_at_k")


@dataclass(frozen=True)
class EvaluationResults:
    """The results of `dsrl eval`."""

    folder: Path
    model: str
    """Folder or hub name of the evaluated model."""
    step: int | None
    """Step of the run that trained the model; None if unknown."""
    benchmarks: dict[str, Summary]
    """Results by benchmark name."""

    def pass_at_k(self, benchmark: str) -> dict[int, float]:
        """Pass@K by K, ascending."""
        values = self.benchmarks[benchmark]["pass_at_k"]
        return dict(sorted((int(k), value) for k, value in values.items()))


def read_results(folder: Path) -> EvaluationResults:
    """Read the results in an output folder of `dsrl eval`.

    Raises:
        UserError: the folder has no results.
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
        raise UserError(f"{folder} has no {RESULTS_FILE}: give an output folder of `dsrl eval`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} does not hold the results of `dsrl eval` ({error!r})") from error


def results_of_run(run_folder: Path) -> list[EvaluationResults]:
    """All evaluations in a run folder, by step; those of unknown steps first.

    Raises:
        UserError: a results file is damaged.
    """
    root = run_folder / EVALUATIONS_FOLDER
    folders = sorted({file.parent for pattern in ("", "*/") for file in root.glob(pattern + RESULTS_FILE)})
    return sorted(map(read_results, folders), key=lambda results: -1 if results.step is None else results.step)


def newest_results(folder: Path) -> EvaluationResults:
    """The results in an output folder of `dsrl eval`, or those of the latest evaluated policy in a run folder.

    Raises:
        UserError: the results are missing or damaged.
    """
    if not (folder / RESULTS_FILE).is_file() and (evaluations := results_of_run(folder)):
        return evaluations[-1]
    return read_results(folder)
