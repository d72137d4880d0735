"""Judge the samples of a finished evaluation again with another verifier: `dsrl rescore`.

Nothing is sampled, so the same samples can be scored like the paper's (`hendrycks`) and with the verifier that we
consider more correct (`math_verify`), side by side in one table.
"""

import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.evaluation.benchmark_evaluator import SAMPLING_FIELDS, reward_settings
from megatron_dsrl.evaluation.metrics import summarise_benchmark
from megatron_dsrl.evaluation.results import read_results, write_results
from megatron_dsrl.evaluation.sample_file import ProblemResult, SampleFile, read_sample_file, read_settings
from megatron_dsrl.rewards.pool import Judgement, RewardPool
from megatron_dsrl.rewards.registry import answer_of


def rescore(evaluation: Path, target: Path, reward: RewardConfig) -> Mapping[str, Any]:
    """Write a second evaluation with the same samples and another verifier's rewards. Returns the results by benchmark
    name, as `write_results` takes them. Raises UserError if the evaluation does not exist, the target is in use, or the
    verifier does not exist.

    Args:
        evaluation: output folder of `dsrl eval`.
        target: an empty or new folder.
    """
    results = read_results(evaluation)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; choose another folder with --output")
    summaries = {}
    try:
        target.mkdir(parents=True, exist_ok=True)
        with RewardPool(reward) as pool:
            for name, before in results.benchmarks.items():
                source = evaluation / "samples" / f"{name}.jsonl"
                problems = list(judged_again(read_sample_file(source), pool))
                with SampleFile(target / "samples" / f"{name}.jsonl", _settings(source, reward)) as samples:
                    for problem in problems:
                        samples.add(problem)
                sampled = {field: before[field] for field in ("title", *SAMPLING_FIELDS) if field in before}
                summaries[name] = {**sampled, **summarise_benchmark(problems, answer_of(reward.function))}
        write_results(target, results.model, summaries, results.step)
    except BaseException:  # the same command starts over
        shutil.rmtree(target, ignore_errors=True)
        raise
    return summaries


def judged_again(problems: Iterable[ProblemResult], pool: RewardPool) -> Iterable[ProblemResult]:
    """Yield the problems with their samples judged by the pool's verifier."""

    def submit(problem: ProblemResult) -> "list[Future[Judgement]]":
        texts = (sample.text for sample in problem.samples)
        return [pool.submit(text, problem.answer, problem.other_answers, problem.prompt) for text in texts]

    waiting = [(problem, submit(problem)) for problem in problems]
    for problem, futures in waiting:
        judgements = [future.result() for future in futures]
        samples = [
            replace(sample, reward=judgement.reward, verdict=judgement.verdict)
            for sample, judgement in zip(problem.samples, judgements, strict=True)
        ]
        yield replace(problem, samples=tuple(samples))


def _settings(source: Path, reward: RewardConfig) -> dict[str, Any]:
    """Settings for the new sample file: the old ones except for the verifier."""
    settings = read_settings(source)
    return {**settings, "benchmark": {**settings.get("benchmark", {}), "reward": reward_settings(reward)}}
