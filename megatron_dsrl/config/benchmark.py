"""Benchmarks, and how `dsrl eval` runs them.

Each is declared in one YAML file in `megatron_dsrl/evaluation/benchmarks/` or in a custom one: the fields of
`BenchmarkConfig`, and under `file` and `hub` those that depend on the source of the problems, a file in the data folder
or the hub. To add a benchmark, write such a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import PlacedReward, PromptSetConfig, RewardConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.rollout import EngineConfig, RolloutConfig
from megatron_dsrl.config.section import Section
from megatron_dsrl.config.validate import validated
from megatron_dsrl.config.yaml_text import parse_yaml, read_text

WEEK_SECONDS = 7 * 24 * 3600
PLACES = ("file", "hub")
BUILT_IN = files("megatron_dsrl.evaluation") / "benchmarks"


def repeated_greedy_samples(temperature: float, samples_per_prompt: int) -> str | None:
    """What is wrong with several samples of a prompt at temperature 0; None for other settings."""
    if temperature > 0 or samples_per_prompt == 1:
        return None
    return (
        f"temperature 0 is greedy decoding, so {samples_per_prompt} samples of a prompt would all be the same; set a "
        "temperature above 0, or samples_per_prompt to 1"
    )


class BenchmarkConfig(PromptSetConfig):
    """A benchmark: its problems, how they are asked, judged and sampled."""

    title: str
    """Shown in tables and plots."""

    reward: RewardConfig
    """The verifier."""

    samples_per_prompt: int = Field(default=32, ge=1)
    """Responses per problem: k of Avg@k."""

    max_response_tokens: int = Field(default=8192, ge=1)
    """Length limit of a response."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy decoding."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off."""

    top_k: int = Field(default=-1, ge=-1)
    """Top-k sampling; -1 is off."""


class PromptLimits(Section):
    """What the engines need to know about the prompts."""

    max_prompt_tokens: int
    """Longest prompt."""

    @property
    def set_rewards(self) -> dict[str, PlacedReward]:
        """A benchmark is not a mixture."""
        return {}


class BenchmarkRunConfig(Section):
    """The engines of `dsrl eval`: the sections of a training run that apply there."""

    seed: int = Field(default=1, ge=0)
    """Seed of sampling."""

    model: ModelConfig
    data: PromptLimits = PromptLimits(max_prompt_tokens=1024)
    parallel: ParallelConfig = ParallelConfig(collective_timeout_seconds=2 * WEEK_SECONDS)
    rollout: RolloutConfig = RolloutConfig(step_timeout_seconds=float(WEEK_SECONDS))
    """Here `step_timeout_seconds` limits a whole benchmark; the benchmark sets the sampling parameters."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)

    @field_validator("engine")
    @classmethod
    def _starts_from_the_weights_on_disk(cls, engine: EngineConfig) -> EngineConfig:
        if engine.quantization is not None:
            raise ValueError("quantization is for training, whose weight push quantises; leave it out")
        return engine


@dataclass(frozen=True)
class Benchmark:
    name: str
    """The file's name."""
    config: BenchmarkConfig


def benchmark_names() -> list[str]:
    """Names of the built-in benchmarks."""
    return sorted(entry.name.removesuffix(".yaml") for entry in BUILT_IN.iterdir() if entry.name.endswith(".yaml"))


def load_benchmark(
    name: str, data_folder: Path | None, changes: Mapping[str, Any] | None = None, section: str = "--benchmarks"
) -> Benchmark:
    """A benchmark by name, or by the path of its YAML file. Raises UserError if the benchmark does not exist, its file
    is invalid, or its problems are not in the data folder.

    Args:
        name: such as `math500` or `mine/geometry.yaml`.
        data_folder: folder with its problem file; None: use the hub.
        changes: fields to replace, such as `samples_per_prompt`.
        section: where the name was given, for messages.
    """
    path, text = _declaration(name, section)
    data, lines = parse_yaml(text, path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a benchmark: expected `key: value` lines")
    place, changes = "hub" if data_folder is None else "file", changes or {}
    sections = {key: data.pop(key, None) for key in PLACES}
    if not isinstance(sections[place], dict):
        hint = "; set --data-folder" if place == "hub" else "; omit --data-folder to use the hub"
        raise UserError(f"{path}: the benchmark has no section `{place}`{hint}")
    merged = {**data, **sections[place], **changes}
    # Messages name the fields of `file` or `hub` like the benchmark's others, and changes as on the command line.
    places = {keys[1:] if keys[:1] == (place,) else keys: f"{path}:{line}" for keys, line in lines.items()}
    places |= {(key,): "command line" for key in changes}
    if data_folder is not None and isinstance(source := merged.get("source"), str):
        file = data_folder / source
        if not any(file.parent.glob(file.name)):
            raise UserError(f"{path}: {source} is not in {data_folder} (--data-folder); put it there, or use the hub")
        merged["source"] = str(file)
    return Benchmark(Path(path).stem, validated(BenchmarkConfig, merged, places, path, "benchmark"))


def _declaration(name: str, section: str) -> tuple[str, str]:
    """Path and text of the file that declares a benchmark."""
    if name.endswith((".yaml", ".yml")):
        try:
            return name, read_text(Path(name))
        except ValueError as error:
            raise UserError(f"{section}: cannot read {name}: {error}") from error
    if name in benchmark_names():
        return f"{name}.yaml", (BUILT_IN / f"{name}.yaml").read_text(encoding="utf-8")
    raise UserError(
        f"{section}: unknown benchmark `{name}`; choose one of {', '.join(benchmark_names())}, or give the path of a "
        ".yaml file that declares one"
    )
