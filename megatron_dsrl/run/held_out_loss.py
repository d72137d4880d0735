"""Evaluation of supervised training: the loss of held-out responses, by the trainer itself."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.algorithms.experience import build_experience
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.common.collective import broadcast, rank
from megatron_dsrl.config.run import EvaluationSetConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.rollout import responses_of
from megatron_dsrl.rollout.without_engines import as_group
from megatron_dsrl.run.device_sharing import SharedDevice
from megatron_dsrl.run.reporting import Reporting


@dataclass(frozen=True)
class HeldOutLosses:
    """Evaluates the loss of held-out sets. Methods are collective."""

    sets: Sequence[tuple[EvaluationSetConfig, Sequence[Prompt]]]
    """The sets and their demonstrations."""
    actor: Actor
    device: SharedDevice
    reporting: Reporting

    def evaluate(self, step: int) -> None:
        """Record the loss of every set after this step (0: before training), except those already recorded.

        Each response is scored given its prompt, in every phase.
        """
        done = broadcast(self.reporting.evaluated_sets(step) if rank() == 0 else set())
        waiting = [(config, demonstrations) for config, demonstrations in self.sets if config.name not in done]
        if not waiting:
            return
        with self.reporting.timeline.span("evaluate"):
            self.device.give_to_trainer()
            for config, demonstrations in waiting:
                self._evaluate_set(config.name, demonstrations, step)
            self.device.give_to_engine()

    def _evaluate_set(self, name: str, demonstrations: Sequence[Prompt], step: int) -> None:
        started = time.perf_counter()
        groups = [as_group(demonstration, step) for demonstration in demonstrations]
        log_probs = self.actor.log_probs(build_experience(responses_of(groups, step), PostTrain()))
        if rank() == 0:
            self.reporting.record_evaluation({"step": step, "set": name, **loss_figures(log_probs)}, started)


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
