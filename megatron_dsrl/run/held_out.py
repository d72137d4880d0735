"""Evaluation of held-out sets during training: the accuracy of samples, or the loss of demonstrations."""

import math
import time
from collections.abc import Sequence

from torch import Tensor

from megatron_dsrl.algorithms.experience import build_experience
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.common.collective import broadcast, rank
from megatron_dsrl.evaluation.sample_file import first_responses
from megatron_dsrl.rollout.rollout import responses_of
from megatron_dsrl.rollout.without_engines import as_group
from megatron_dsrl.run.reporting import record_evaluation
from megatron_dsrl.run.sampling import recover, unless_stopped
from megatron_dsrl.run.start import TrainingRun


def evaluate_accuracy(run: TrainingRun, step: int) -> None:
    """Sample and judge responses, except of sets that are already recorded for this step. Collective.

    A request to stop ends the evaluation; the run then stops before its next step, and evaluates when it is continued.
    """

    def evaluate() -> None:
        assert run.evaluator is not None and run.tracker is not None
        started = time.perf_counter()
        for evaluation in run.evaluator.evaluate(step, except_for=run.tracker.evaluated_sets(step)):
            shown = first_responses(evaluation.problems, run.config.observability.evaluation_responses)
            record_evaluation(run, evaluation.record, started, shown)
            started = time.perf_counter()

    with run.timeline.span("evaluate"):
        run.rollout.while_sampling(lambda: unless_stopped(run, evaluate), lambda: recover(run, version=step + 1))


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
    """`loss`, the mean negative log-likelihood per token in nat, and what it was measured on.

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
