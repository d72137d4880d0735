"""Evaluates one benchmark: reads finished samples from disk; samples, judges and saves the rest."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.benchmark import Benchmark
from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.evaluation.metrics import summarise_benchmark
from megatron_dsrl.evaluation.sample_file import ProblemResult, SampleFile
from megatron_dsrl.observability.console import duration
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rewards.registry import answer_of
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.sample import Sample, SamplingParameters

SAMPLING_FIELDS = ("temperature", "top_p", "max_response_tokens", "limit")
"""Benchmark fields that are saved with its results."""
LINE_SECONDS = 30.0
"""Time between lines of progress in a log."""


def evaluate_benchmark(
    benchmark: Benchmark,
    prompts: Sequence[Prompt],
    sampler: EngineRollout | None,
    stop_token_ids: tuple[int, ...],
    file: Path,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Sample and judge what is not in the file yet; returns title, sampling fields and results of the whole benchmark.
    Raises UserError if the file belongs to another evaluation.

    Args:
        sampler: source of responses; None if the benchmark is finished.
        settings: everything else that determines the samples; must be the same when an evaluation continues.
    """
    config = benchmark.config
    sampling = SamplingParameters.for_evaluation(config, config.max_response_tokens, stop_token_ids)
    with _sample_file(benchmark, prompts, file, settings) as samples:
        missing = _missing(benchmark, prompts, samples)
        if missing:
            assert sampler is not None, f"{len(missing)} samples of {benchmark.name} are missing"
            _sample(benchmark, missing, len(prompts), sampler, sampling, samples)
        problems = samples.problems
        results = [problems[prompt.index] for prompt in prompts]
    sampled = {field: getattr(config, field) for field in ("title", *SAMPLING_FIELDS)}
    return {**sampled, **summarise_benchmark(results, answer_of(config.reward.function))}


def missing_samples(
    benchmark: Benchmark, prompts: Sequence[Prompt], file: Path, settings: Mapping[str, Any]
) -> list[tuple[Prompt, int]]:
    """(problem, sample number) of the samples that are not in the file yet. Raises like `evaluate_benchmark`."""
    with _sample_file(benchmark, prompts, file, settings) as samples:
        return _missing(benchmark, prompts, samples)


def _missing(benchmark: Benchmark, prompts: Sequence[Prompt], samples: SampleFile) -> list[tuple[Prompt, int]]:
    numbers = set(range(benchmark.config.samples_per_prompt))
    return [(prompt, number) for prompt in prompts for number in sorted(numbers - samples.numbers(prompt.index))]


def _sample_file(
    benchmark: Benchmark, prompts: Sequence[Prompt], file: Path, settings: Mapping[str, Any]
) -> SampleFile:
    samples = SampleFile(file, {**settings, "benchmark": _settings(benchmark)})
    problems = samples.problems
    for prompt in prompts:
        if prompt.index in problems and problems[prompt.index].prompt != prompt.text:
            raise UserError(
                f"{file} holds a different problem {prompt.index}: the benchmark's data or the chat template has "
                "changed. Choose another folder with --output, or delete the file."
            )
    return samples


def _sample(
    benchmark: Benchmark,
    missing: Sequence[tuple[Prompt, int]],
    problems: int,
    sampler: EngineRollout,
    sampling: SamplingParameters,
    samples: SampleFile,
) -> None:
    config = benchmark.config
    left = Counter(prompt.index for prompt, _ in missing)
    with (
        RewardPool(config.reward, section=reward_section(benchmark)) as rewards,
        benchmark_progress(config.title, problems, problems - len(left), len(missing)) as sampled,
    ):

        def keep(prompt: Prompt, number: int, sample: Sample) -> None:
            samples.add(ProblemResult.of_sample(prompt, number, sample))
            left[prompt.index] -= 1
            sampled(left[prompt.index] == 0)

        sampler.generate_samples(missing, sampling, f"benchmark {benchmark.name}", keep, rewards)


def _settings(benchmark: Benchmark) -> dict[str, Any]:
    """Everything that determines samples and rewards; not the file's location or the number of reward workers."""
    settings = benchmark.config.model_dump(mode="json", exclude={"source", "title", "limit", "reward"})
    return {"name": benchmark.name, **settings, "reward": reward_settings(benchmark.config.reward)}


def reward_section(benchmark: Benchmark) -> str:
    """The place of the benchmark's verifier, for messages."""
    return f"benchmark {benchmark.name}: reward"


def reward_settings(reward: RewardConfig) -> dict[str, Any]:
    """Everything that determines rewards; not the number of workers or their limits."""
    return reward.model_dump(mode="json", include={"function", "options", "overlong"})


@contextmanager
def benchmark_progress(title: str, problems: int, done: int, to_sample: int) -> Iterator[Callable[[bool], None]]:
    """A bar on a terminal; elsewhere a line every half minute, to keep logs readable. Yields a function to call after
    each sample that is judged and on disk, with whether it was its problem's last one.

    Args:
        done: number of problems that have all their samples.
        to_sample: number of samples that are missing.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    is_terminal = sys.stdout.isatty()
    started = last_line = time.monotonic()
    sampled = 0
    with Progress(*columns, console=Console(), transient=True, disable=not is_terminal) as bar:
        task = bar.add_task(title, total=problems, completed=done)

        def show(problem_is_done: bool) -> None:
            nonlocal done, sampled, last_line
            sampled += 1
            done += problem_is_done
            now = time.monotonic()
            line = f"{title}: {done} of {problems} problems"
            if sampled < to_sample:
                line += f", {duration((now - started) / sampled * (to_sample - sampled))} left"
            bar.update(task, description=line, completed=done)
            if not is_terminal and now - last_line >= LINE_SECONDS:
                print(line, flush=True)
                last_line = now

        yield show
