"""Evaluation during training: held-out sets on the training's own engines, with its verifier.

The policy is evaluated where it samples, in the engines and with their current weights; nothing is loaded or copied.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from megatron_dsrl.config.run import EvaluationSetConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.evaluation.metrics import summarise, summarise_benchmark
from megatron_dsrl.evaluation.sample_file import ProblemResult
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rewards.registry import answer_of, check_options
from megatron_dsrl.rollout.rollout import Generator
from megatron_dsrl.rollout.sample import SamplingParameters

EvaluationRecord = dict[str, int | float | str | None]
"""step, set, the results of `summarise`, and the 95 % interval of the accuracy: confidence_low_95 and
confidence_high_95. For n = samples_per_prompt above 1 also `pass@k` for k = 2, 4, 8, ..., n, and `majority@n` if
answers can be compared."""


@dataclass(frozen=True)
class Evaluation:
    """Result of evaluating one set."""

    record: EvaluationRecord
    problems: list[ProblemResult]
    """All of the set, in its order."""


class Evaluator:
    """Evaluates all held-out sets of a run. On rank 0 only, where the rollout side samples."""

    def __init__(
        self, sets: Sequence[tuple[EvaluationSetConfig, Sequence[Prompt]]], rollout: Generator, verifier: str
    ) -> None:
        """
        Args:
            sets: the held-out sets and their prompts.
            rollout: samples and judges, with the stop tokens of training; its length limit is for sets without one.
            verifier: name of the run's verifier, for sets without their own.

        Raises:
            UserError: a verifier does not exist or does not take its options.
        """
        for position, (config, _) in enumerate(sets):
            if config.reward is not None:
                check_options(config.reward.function, config.reward.options, f"evaluation.sets.{position}.reward")
        self._sets = sets
        self._rollout = rollout
        self._verifier = verifier

    def evaluate(self, step: int, except_for: Collection[str] = ()) -> Iterator[Evaluation]:
        """Yield one evaluation per set under the engines' current weights, each as soon as it is finished.

        Args:
            step: labels the evaluations; 0 is before training.
            except_for: names of sets to leave out.
        """
        for config, prompts in self._sets:
            if config.name not in except_for:
                yield self._evaluate_set(config, prompts, step)

    def _evaluate_set(self, config: EvaluationSetConfig, prompts: Sequence[Prompt], step: int) -> Evaluation:
        training = self._rollout.training_sampling
        sampling = SamplingParameters(
            max_response_tokens=config.max_response_tokens or training.max_response_tokens,
            stop_token_ids=training.stop_token_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        # Workers of a set's own verifier run only during its evaluation, which is rare; training needs the cores.
        with RewardPool(config.reward) if config.reward else nullcontext() as rewards:
            groups = self._rollout.generate(
                prompts, config.samples_per_prompt, sampling, stream=f"evaluation {config.name}", rewards=rewards
            )
        problems = [ProblemResult.of_group(group) for group in groups]
        figures = summarise_benchmark(problems, answer_of(config.reward.function if config.reward else self._verifier))
        low, high = figures["confidence_interval_95"] or (None, None)
        record = {"step": step, "set": config.name, **summarise(problems)}
        record |= {"confidence_low_95": low, "confidence_high_95": high}
        if (count := config.samples_per_prompt) > 1:
            record |= {f"pass@{k}": value for k, value in figures["pass_at_k"].items() if k > 1}
            if figures["majority_at_k"] is not None:
                record[f"majority@{count}"] = figures["majority_at_k"]
        return Evaluation(record, problems)
