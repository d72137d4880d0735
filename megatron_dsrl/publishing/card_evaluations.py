"""The evaluations that a model card shows, and how the hub takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.benchmark import load_benchmark
from megatron_dsrl.evaluation.results import results_of_run
from megatron_dsrl.observability.records import EVALUATION_FILE, read_records


@dataclass(frozen=True)
class CardEvaluation:
    """One benchmark or held-out set."""

    title: str
    dataset: str
    """Hub name if the benchmark comes from the hub, else its own name."""
    problems: int
    samples: int
    """Per problem: k of Avg@k."""
    accuracy: float
    standard_error: float | None
    before: float | None = None
    """Accuracy before training, if it was measured."""
    pass_at_k: float | None = None
    """With k = `samples`."""


def evaluations_of(run_folder: Path, step: int) -> list[CardEvaluation]:
    """Evaluations of the policy after a step: benchmarks of `dsrl eval`, then held-out sets from training.

    Raises:
        UserError: a file is damaged.
    """
    benchmarks = {
        name: CardEvaluation(
            summary["title"],
            _hub_name(name),
            **_measured(summary),
            pass_at_k=results.pass_at_k(name).get(summary["samples_per_prompt"]),
        )
        for results in results_of_run(run_folder)
        if results.step == step
        for name, summary in results.benchmarks.items()
    }
    records = [one for one in read_records(run_folder / EVALUATION_FILE) if one.get("accuracy") is not None]
    before = {record["set"]: record["accuracy"] for record in records if record["step"] == 0}
    held_out = {
        record["set"]: CardEvaluation(
            record["set"], record["set"], **_measured(record), before=before.get(record["set"])
        )
        for record in records
        if record["step"] == step
    }
    return [*benchmarks.values(), *held_out.values()]


def _measured(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "problems": values["problems"],
        "samples": values["samples_per_prompt"],
        "accuracy": values["accuracy"],
        "standard_error": values.get("standard_error"),
    }


def _hub_name(benchmark: str) -> str:
    """Hub name of a built-in benchmark; any other name unchanged."""
    try:
        return load_benchmark(benchmark, None).config.source
    except UserError:
        return benchmark


def model_index(evaluations: Sequence[CardEvaluation]) -> list[EvalResult]:
    """The evaluations in the hub's format, in percent."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=one.dataset,
            dataset_name=one.title,
            metric_type=kind,
            metric_name=f"{name}@{one.samples}",
            metric_value=round(100 * value, 2),
        )
        for one in evaluations
        for kind, name, value in (("accuracy", "Avg", one.accuracy), ("pass@k", "Pass", one.pass_at_k))
        if value is not None and (kind, one.samples) != ("pass@k", 1)  # which is Avg@1
    ]
