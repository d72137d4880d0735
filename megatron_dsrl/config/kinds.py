"""The kinds of configuration: a run's and the smaller ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_dsrl.config.benchmark import BenchmarkConfig, BenchmarkRunConfig
from megatron_dsrl.config.json_schema import inheriting_schema, partial_schema, section_schema
from megatron_dsrl.config.model import GradientAnalysisConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.config.section import Section
from megatron_dsrl.config.sweep import SweepConfig


@dataclass(frozen=True)
class Kind:
    """One kind of configuration."""

    section: type[Section]
    where: str
    """Where it is written."""
    schema: Callable[[], dict[str, Any]]
    """Returns the JSON schema of its files, or of all its overrides."""


def _benchmark_file() -> dict[str, Any]:
    """`file` and `hub` hold the fields that depend on where the problems come from."""
    schema = partial_schema(BenchmarkConfig)
    place = {"type": "object", "properties": schema["properties"], "additionalProperties": False}
    places = {
        "file": {"description": "Settings for problems from a file in the data folder.", **place},
        "hub": {"description": "Settings for problems from the hub.", **place},
    }
    return schema | {"properties": schema["properties"] | places, "anyOf": [{"required": [each]} for each in places]}


KINDS = {
    "run": Kind(RunConfig, "a file for `dsrl train`", lambda: inheriting_schema(RunConfig)),
    "sweep": Kind(SweepConfig, "a file for `dsrl sweep`", lambda: section_schema(SweepConfig)),
    "benchmark": Kind(BenchmarkConfig, "a file for `dsrl eval --benchmarks`", _benchmark_file),
    "eval": Kind(BenchmarkRunConfig, "overrides of `dsrl eval`", lambda: partial_schema(BenchmarkRunConfig)),
    "gradients": Kind(
        GradientAnalysisConfig,
        "overrides of `dsrl analyse gradients` and `dsrl samples --log-probs`",
        lambda: partial_schema(GradientAnalysisConfig),
    ),
}
"""By name, as in `dsrl config --kind`."""

FILES = ("run", "sweep", "benchmark")
"""The kinds that are files."""
