"""One benchmark through the engines: what is finished is read, the rest is sampled, judged and written down."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.errors import UserError
from megatron_dsrl.evaluation.benchmark import Benchmark
from megatron_dsrl.evaluation.problem_result import ProblemResult
from megatron_dsrl.evaluation.progress import benchmark_progress
from megatron_dsrl.evaluation.sample_file import SampleFile
from megatron_dsrl.evaluation.summary import summarise_benchmark
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rewards.registry import answer_of
from megatron_dsrl.rollout.sample import Group
from megatron_dsrl.rollout.sampling import SamplingParameters

SAMPLING_FIELDS = ("temperature", "top_p", "max_response_tokens", "limit")
"""Of a benchmark, kept beside its figures."""


class SamplesGroups(Protocol):
    """The part of the rollout side that a benchmark needs; see `EngineRollout.generate`."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: SamplingParameters,
        stream: str,
        on_samples: Callable[[int], None],
        on_group: Callable[[Group], None],
        rewards: RewardPool,
    ) -> list[Group]: ...


def evaluate_benchmark(
    benchmark: Benchmark,
    prompts: Sequence[Prompt],
    sampler: SamplesGroups | None,
    stop_token_ids: tuple[int, ...],
    file: Path,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Sample and judge what is not in the file yet; the figures of the whole, with the title and how it was sampled.

    Args:
        benchmark: which.
        prompts: all its problems.
        sampler: where responses come from; None if the benchmark is finished.
        stop_token_ids: tokens that end a response.
        file: where the samples are kept.
        settings: what besides the benchmark decides about the samples; an evaluation that continues must have the same.

    Raises:
        UserError: the file belongs to another evaluation.
    """
    config = benchmark.config
    sampling = SamplingParameters(
        max_response_tokens=config.max_response_tokens,
        stop_token_ids=stop_token_ids,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
    )
    with _sample_file(benchmark, prompts, file, settings) as samples:
        missing = [prompt for prompt in prompts if prompt.index not in samples.done]
        if missing:
            assert sampler is not None, f"{len(missing)} problems of {benchmark.name} have no samples yet"
            _sample(benchmark, missing, len(prompts), sampler, sampling, samples)
        results = [samples.done[prompt.index] for prompt in prompts]
    sampled = {field: getattr(config, field) for field in ("title", *SAMPLING_FIELDS)}
    return {**sampled, **summarise_benchmark(results, answer_of(config.reward.function))}


def missing_prompts(
    benchmark: Benchmark, prompts: Sequence[Prompt], file: Path, settings: Mapping[str, Any]
) -> list[Prompt]:
    """The problems that have no samples in the file yet.

    Raises:
        UserError: the file belongs to another evaluation.
    """
    with _sample_file(benchmark, prompts, file, settings) as samples:
        return [prompt for prompt in prompts if prompt.index not in samples.done]


def _sample_file(
    benchmark: Benchmark, prompts: Sequence[Prompt], file: Path, settings: Mapping[str, Any]
) -> SampleFile:
    samples = SampleFile(file, {**settings, "benchmark": _settings(benchmark)})
    for prompt in prompts:
        if prompt.index in samples.done and samples.done[prompt.index].prompt != prompt.text:
            raise UserError(
                f"{file} holds another problem {prompt.index}: the benchmark's data or the chat template have changed. "
                "Name another folder with --output, or remove the file."
            )
    return samples


def _sample(
    benchmark: Benchmark,
    missing: Sequence[Prompt],
    problems: int,
    sampler: SamplesGroups,
    sampling: SamplingParameters,
    samples: SampleFile,
) -> None:
    config = benchmark.config
    done = problems - len(missing)
    with (
        RewardPool(config.reward) as rewards,
        benchmark_progress(config.title, problems, done, config.samples_per_prompt) as progress,
    ):

        def keep(group: Group) -> None:
            samples.add(ProblemResult.of_group(group))
            progress.finished()

        sampler.generate(
            missing,
            config.samples_per_prompt,
            sampling,
            stream=f"benchmark {benchmark.name}",
            on_samples=progress.sampled,
            on_group=keep,
            rewards=rewards,
        )


def _settings(benchmark: Benchmark) -> dict[str, Any]:
    """What decides about the samples and their rewards. Where the file lies, and how many workers judge, does not."""
    settings = benchmark.config.model_dump(mode="json", exclude={"source", "title", "limit"})
    for field in ("workers", "timeout_seconds", "memory_megabytes"):
        del settings["reward"][field]
    return {"name": benchmark.name, **settings}
