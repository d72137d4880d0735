"""Evaluation of held-out sets during training: the accuracy of samples, or the loss of demonstrations."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from megatron_dsrl.algorithms.experience import build_experience
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.common.collective import broadcast, rank
from megatron_dsrl.config.run import EvaluationSetConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.evaluation.metrics import summarise, summarise_benchmark
from megatron_dsrl.evaluation.sample_file import ProblemResult, first_responses
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rewards.registry import answer_of
from megatron_dsrl.rollout.rollout import Rollout, responses_of
from megatron_dsrl.rollout.sample import SamplingParameters
from megatron_dsrl.rollout.without_engines import as_group
from megatron_dsrl.run.reporting import record_evaluation
from megatron_dsrl.run.sampling import recover, unless_stopped
from megatron_dsrl.run.start import TrainingRun

EvaluationRecord = dict[str, int | float | str | None]
"""step, set, the results of `summarise`, and the 95 % interval of the accuracy: confidence_low_95 and
confidence_high_95. For n = samples_per_prompt above 1 also `pass@k` for k = 2, 4, 8, ..., n, and `majority@n` if
answers can be compared."""


def evaluate_accuracy(run: TrainingRun, step: int) -> None:
    """Sample and judge responses, except of sets that are already recorded for this step. Collective.

    The engines sample with their current weights; nothing is loaded or copied. A request to stop ends the evaluation;
    the run then stops before its next step, and evaluates when it is continued.
    """

    def evaluate() -> None:
        assert run.tracker is not None
        done = run.tracker.evaluated_sets(step)
        for position, (config, prompts) in enumerate(run.inputs.evaluation_sets):
            if config.name not in done:
                started = time.perf_counter()
                section, verifier = f"evaluation.sets.{position}", run.config.reward.function
                record, problems = evaluate_set(config, prompts, step, run.rollout, verifier, section)
                shown = first_responses(problems, run.config.observability.evaluation_responses)
                record_evaluation(run, record, started, shown)

    with run.timeline.span("evaluate"):
        run.rollout.while_sampling(lambda: unless_stopped(run, evaluate), lambda: recover(run, version=step + 1))


def evaluate_set(
    config: EvaluationSetConfig,
    prompts: Sequence[Prompt],
    step: int,
    rollout: Rollout,
    verifier: str,
    section: str,
) -> tuple[EvaluationRecord, list[ProblemResult]]:
    """The record of a set, and its problems in order. On rank 0 only, where the rollout side samples.

    Args:
        rollout: samples with the stop tokens of training; its length limit is for sets without one.
        verifier: name of the run's verifier, for sets without their own.
        section: place of the set in the run's configuration, for messages.
    """
    training = rollout.training_sampling
    limit = config.max_response_tokens or training.max_response_tokens
    sampling = SamplingParameters.for_evaluation(config, limit, training.stop_token_ids)
    # Workers of a set's own verifier run only during its evaluation, which is rare; training needs the cores.
    own_verifier = RewardPool(config.reward, section=f"{section}.reward") if config.reward else nullcontext()
    with own_verifier as rewards:
        groups = rollout.generate(
            prompts, config.samples_per_prompt, sampling, stream=f"evaluation {config.name}", rewards=rewards
        )
    problems = [ProblemResult.of_group(group) for group in groups]
    figures = summarise_benchmark(problems, answer_of(config.reward.function if config.reward else verifier))
    low, high = figures["confidence_interval_95"] or (None, None)
    record = {"step": step, "set": config.name, **summarise(problems)}
    record |= {"confidence_low_95": low, "confidence_high_95": high}
    if (count := config.samples_per_prompt) > 1:
        record |= {f"pass@{k}": value for k, value in figures["pass_at_k"].items() if k > 1}
        if figures["majority_at_k"] is not None:
            record[f"majority@{count}"] = figures["majority_at_k"]
    return record, problems


def evaluate_loss(run: TrainingRun, step: int) -> None:
    """Measure the policy's loss on demonstrations, except of sets that are already recorded for this step. Collective.

    Each response is scored given its prompt, in every phase.
    """
    done = broadcast(run.tracker.evaluated_sets(step) if run.tracker else set())
    waiting = [(config.name, prompts) for config, prompts in run.inputs.evaluation_sets if config.name not in done]
    if not waiting:
        return
    with run.timeline.span("evaluate"):
        run.device.give_to_trainer()
        for name, demonstrations in waiting:
            started = time.perf_counter()
            groups = [as_group(demonstration, step) for demonstration in demonstrations]
            log_probs = run.models.actor.log_probs(build_experience(responses_of(groups, step), PostTrain()))
            if rank() == 0:
                record_evaluation(run, {"step": step, "set": name, **loss_figures(log_probs)}, started)
        run.device.give_to_engine()


def loss_figures(log_probs: Sequence[Tensor]) -> dict[str, float]:
    """`loss`, the mean negative log-likelihood per token in nats, and what it was measured on.

    Args:
        log_probs: [response tokens] for each response; at least one token in all.

    Returns:
        `loss`; `loss_standard_error`, which takes whole responses as independent (a ratio estimator: long responses
        count more, as they do in the loss), NaN for a single response; `responses` and `tokens`.
    """
    sums = [-values.double().sum().item() for values in log_probs]
    tokens = [len(values) for values in log_probs]
    loss, count = sum(sums) / sum(tokens), len(sums)
    squares = sum((total - loss * length) ** 2 for total, length in zip(sums, tokens, strict=True))
    error = math.sqrt(squares * count / (count - 1)) / sum(tokens) if count > 1 else math.nan
    return {"loss": loss, "loss_standard_error": error, "responses": count, "tokens": sum(tokens)}
