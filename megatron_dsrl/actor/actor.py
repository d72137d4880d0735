"""The policy under training: one object per rank; all methods are collective over the ranks."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_dsrl.actor.forward_backward import MicroBatch
from megatron_dsrl.actor.log_probs import LogProbOptions, VocabularyShard, log_probs_and_entropy
from megatron_dsrl.actor.packing import PackedRow
from megatron_dsrl.actor.sharded_model import TrainableModel, require_finite
from megatron_dsrl.actor.statistics import ObjectiveMetrics, TokenStatistics, UpdateMetrics, share_with_all_stages
from megatron_dsrl.algorithms.experience import Experience, PerToken, concatenate_tokens
from megatron_dsrl.algorithms.importance import mismatch_metrics
from megatron_dsrl.algorithms.losses import ScoredTokens
from megatron_dsrl.algorithms.objective import Objective
from megatron_dsrl.config.model import RouterConfig
from megatron_dsrl.model.output_rows import FactoredLogits
from megatron_dsrl.model.router import adding_router_losses
from megatron_dsrl.weights.export import export_hf_folder
from megatron_dsrl.weights.load import load_weights
from megatron_dsrl.weights.peft import PeftAdapters

ScoreResult = tuple[str, TokenStatistics]
"""Name of an objective, and the statistics of one of its micro-batches."""


class Actor:
    """A sharded decoder with its optimizer: scores sequences and takes optimizer steps on them.

    Every rank passes the same global batch and trains on its data-parallel share of it. Samples without a gradient
    (`Objective.samples_with_gradient`) count in the loss's denominator but are not computed, so the metrics of tokens,
    such as their entropy, describe the other samples.
    """

    def __init__(
        self,
        model: TrainableModel,
        folder: Path,
        vocab_size: int,
        temperature: float,
        router: RouterConfig,
        kept_logits_bytes: int,
        adapters: PeftAdapters | None,
    ) -> None:
        """Use `build_actor` to create one.

        Args:
            folder: HF folder the model was loaded from; exports copy its config.json and tokenizer.
            vocab_size: rows of the HF embedding; Megatron's padding rows are not scored.
            temperature: sampling temperature; logits are divided by it.
            router: router losses of a mixture of experts, added in every optimizer step. They are over all tokens, so
                with them every sample is computed.
            kept_logits_bytes: logits of a micro-batch that are kept for its backward pass; see `LogProbOptions`.
            adapters: the model's LoRA adapters; None if all weights are trained.
        """
        self.model = model
        self._folder = folder
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._router = router
        self._kept_logits_bytes = kept_logits_bytes
        self._adapters = adapters

    def update(self, objectives: Sequence[Objective], mini_batches: int = 1, epochs: int = 1) -> UpdateMetrics | None:
        """Take `mini_batches * epochs` optimizer steps: in each epoch, one on each consecutive part of the experience.

        With more than one step, those after the first are off-policy and need the log-probs of the policy before the
        update (`with_old_log_probs`). With one step these equal the current ones. Returns metrics, the same on every
        rank; None if no sequence had to be trained on and no step was taken. Raises FloatingPointError if the loss or
        the gradient norm is not finite.

        Args:
            objectives: terms of the loss, with the global batch, the same on every rank. Every optimizer step uses its
                part of each.
        """
        experiences = [objective.experience for objective in objectives if len(objective.experience) > 0]
        assert mini_batches * epochs == 1 or all(each.old_log_probs is not None for each in experiences)
        steps = []
        for _ in range(epochs):
            for parts in zip(*(objective.mini_batches(mini_batches) for objective in objectives)):
                parts_with_sequences = [part for part in parts if len(part.experience) > 0]
                if parts_with_sequences:
                    steps.append(self._optimizer_step(parts_with_sequences))
        return UpdateMetrics.merge(steps) if steps else None

    def load_model(self, folder: Path) -> None:
        """Fill the parameters, but not the optimizer's master weights, from an HF folder or Megatron distributed
        checkpoint of the same architecture. Adapters stay as they are. Raises UserError if the weights are damaged or
        do not match."""
        load_weights(self.model.chunks, self.model.table, folder)

    def log_probs(self, experience: Experience) -> PerToken:
        """Log-probs of the scored tokens of each sequence under the current weights, the same on every rank."""
        return self.model.score_tokens(
            experience.sequences,
            lambda row, logits: self._log_probs_and_entropy(row, logits)[0],
            experience.routed_experts,
        )

    def export_hf(self, target: Path) -> None:
        """Write the current weights as an HF folder, and adapters within it; see `export_hf_folder`."""
        export_hf_folder(
            self.model.chunks, self.model.table, self._folder, target, self.model.config.params_dtype,
            adapters=self._adapters,
        )  # fmt: skip

    def with_old_log_probs(self, objective: Objective) -> Objective:
        """The objective with old log-probs: its own if it has them, otherwise those under the current weights, with NaN
        for samples that the update does not compute."""
        experience = objective.experience
        if experience.old_log_probs is not None or len(experience) == 0:
            return objective
        old, computed = [torch.full((count,), math.nan) for count in experience.num_scored], self._computed(objective)
        for i, values in zip(computed, self.log_probs(experience.select(computed)), strict=True):
            old[i] = values
        return replace(objective, experience=replace(experience, old_log_probs=tuple(old)))

    def _optimizer_step(self, objectives: Sequence[Objective]) -> UpdateMetrics:
        micro_batches = [micro_batch for objective in objectives for micro_batch in self._micro_batches(objective)]
        sequences = [sequence for objective in objectives for sequence in objective.experience.sequences]
        num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
        with adding_router_losses(self.model.chunks, self._router, num_tokens) as router_losses:
            kept = self.model.accumulate_gradients(micro_batches)
        metrics = share_with_all_stages(self._objective_metrics(objectives, kept) if kept else None)
        require_finite("loss", sum(objective.loss for objective in metrics.values()))
        grad_norm, learning_rate = self.model.take_step()
        return UpdateMetrics(grad_norm, learning_rate, metrics, router_losses.metrics(self.model.config.num_layers))

    def _computed(self, objective: Objective) -> list[int]:
        """Indices of an objective's samples that an optimizer step computes."""
        return list(range(len(objective.experience))) if self._router.has_losses else objective.samples_with_gradient

    def _micro_batches(self, objective: Objective) -> list[MicroBatch[ScoreResult]]:
        """This rank's share of an objective's computed samples, with their weights in the whole objective."""
        weights = objective.aggregation(objective.experience.num_scored) * objective.coefficient
        computed = self._computed(objective)
        objective = replace(objective, experience=objective.experience.select(computed))
        num_scored = objective.experience.num_scored
        token_weights = tuple(weight.expand(count) for weight, count in zip(weights[computed], num_scored))
        rows = self.model.pack_share(objective.experience.sequences, objective.experience.routed_experts)
        return [self._micro_batch(objective, token_weights, row) for row in rows]

    def _micro_batch(self, objective: Objective, weights: PerToken, row: PackedRow) -> MicroBatch[ScoreResult]:
        """A packed row of an objective; the loss is the sum of weight * token loss over all rows of all ranks."""
        experience, device = objective.experience, self.model.device
        advantages = experience.advantages
        assert advantages is not None, "call with_advantages first"

        def row_tokens(values: PerToken) -> Tensor:
            return concatenate_tokens(values, row.indices, device)

        def score(logits: FactoredLogits) -> tuple[Tensor, ScoreResult]:
            """The objective's loss of one packed row, and its statistics, from the model's output."""
            log_probs, entropy = self._log_probs_and_entropy(row, logits, objective.needs_entropy_gradient)
            old, reference = experience.old_log_probs, experience.reference_log_probs
            engine, older = experience.engine_log_probs, experience.from_older_weights
            tokens = ScoredTokens(
                log_probs=log_probs,
                entropy=entropy,
                old_log_probs=log_probs.detach() if old is None else row_tokens(old),
                engine_log_probs=None if engine is None else row_tokens(engine),
                reference_log_probs=None if reference is None else row_tokens(reference),
                advantages=row_tokens(advantages),
                num_scored=row.num_scored,
                from_older_weights=None if older is None else row_tokens(older),
            )
            result = objective.loss(tokens)
            loss = (result.losses * row_tokens(weights)).sum()
            means: dict[str, Tensor] = {"entropy": entropy, **result.metrics}
            maxima: dict[str, Tensor] = {}
            if tokens.engine_log_probs is not None:
                mismatch, maxima = mismatch_metrics(tokens.old_log_probs, tokens.engine_log_probs)
                means |= mismatch
            return loss, (objective.name, TokenStatistics.from_tokens(loss, means, maxima))

        return MicroBatch(row, score)

    def _log_probs_and_entropy(
        self, row: PackedRow, logits: FactoredLogits, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """[sum(num_scored)] each, for all scored tokens of a row, from this rank's logits [S, vocabulary shard]."""
        shard = VocabularyShard.for_this_rank(len(logits.weight), self._vocab_size)
        options = LogProbOptions(shard, self._temperature, entropy_gradient, self._kept_logits_bytes)
        log_probs, entropy = row.assemble(torch.stack(log_probs_and_entropy(logits, row.targets, options)))
        return log_probs, entropy if entropy_gradient else entropy.detach()

    def _objective_metrics(
        self, objectives: Sequence[Objective], kept: Sequence[ScoreResult]
    ) -> dict[str, ObjectiveMetrics]:
        """Metrics by objective over all data-parallel replicas. Collective over the last pipeline stage."""
        return {
            objective.name: ObjectiveMetrics.from_step(
                TokenStatistics.add_up([part for name, part in kept if name == objective.name]).over_replicas(),
                objective.experience.num_scored,
                computed_samples=len(self._computed(objective)),
            )
            for objective in objectives
        }
