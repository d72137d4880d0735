"""The policy under training: one object per rank, all of whose methods are collective over the ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_dsrl.actor.forward_backward import run_schedule, sum_gradients
from megatron_dsrl.actor.log_probs import VocabularyShard, log_probs_and_entropy
from megatron_dsrl.actor.micro_batch_plan import plan_micro_batches
from megatron_dsrl.actor.packing import MicroBatch, pack
from megatron_dsrl.actor.saved_state import load_state, save_state
from megatron_dsrl.actor.statistics import TokenStatistics, UpdateMetrics
from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.losses import TokenLoss, token_mean_weights
from megatron_dsrl.weights.export import export_hf_folder
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import WeightTable


class Actor:
    """A sharded Qwen3 with its optimizer: scores sequences and takes optimizer steps on them.

    Every rank passes the same global batch; each trains its data-parallel share of it.
    """

    def __init__(
        self,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        table: WeightTable,
        folder: Path,
        vocab_size: int,
        temperature: float,
        max_tokens_per_micro_batch: int,
    ):
        """Take over a model; see `build_actor` for how it is made.

        Args:
            chunks: this pipeline stage's model chunks, wrapped for data parallelism, weights loaded.
            optimizer: over the same chunks.
            scheduler: learning-rate schedule of the optimizer.
            table: names of the weights in HF checkpoints.
            folder: HF folder that the model came from; an export takes its config.json and tokenizer.
            vocab_size: rows of the HF embedding; what Megatron pads behind them is not scored.
            temperature: sampling temperature, by which logits are divided.
            max_tokens_per_micro_batch: token budget of a packed row.
        """
        self._chunks = chunks
        self._config = chunks[0].config
        self._config.finalize_model_grads_func = sum_gradients  # the weights of the loss carry the token count
        self._device = next(chunks[0].parameters()).device
        self._table = table
        self._folder = folder
        self._vocab_size = vocab_size
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._temperature = temperature
        self._max_tokens = max_tokens_per_micro_batch

    def update(
        self, experience: Experience, token_loss: TokenLoss, coefficient: float = 1.0, mini_batches: int = 1
    ) -> UpdateMetrics | None:
        """Take `mini_batches` optimizer steps on the experience, one on each consecutive part of it.

        With more than one step the parts after the first are off-policy: the log-probs of the policy before the
        update are computed first. With one step they are the current ones, and that pass is skipped.

        Args:
            experience: the global batch, the same on every rank.
            token_loss: loss of each scored token.
            coefficient: factor on the loss.
            mini_batches: optimizer steps.

        Returns:
            Metrics, the same on every rank; None if no sequence was there to train on, and no step was taken.

        Raises:
            FloatingPointError: if loss or gradient norm is not finite.
        """
        if mini_batches > 1 and len(experience) > 0:
            experience = replace(experience, old_log_probs=self.log_probs(experience))
        parts = [part for part in experience.mini_batches(mini_batches) if len(part) > 0]
        steps = [self._optimizer_step(part, token_loss, coefficient) for part in parts]
        return UpdateMetrics.merge(steps) if steps else None

    def _optimizer_step(self, experience: Experience, token_loss: TokenLoss, coefficient: float) -> UpdateMetrics:
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()

        def score(micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, TokenStatistics]:
            log_probs, entropy = self._score(micro_batch, logits)
            old_log_probs = log_probs.detach() if micro_batch.old_log_probs is None else micro_batch.old_log_probs
            result = token_loss(log_probs, old_log_probs, micro_batch.advantages)
            loss = coefficient * (result.losses * micro_batch.weights).sum()
            return loss, TokenStatistics.of_tokens(
                loss, entropy, result.clipped, log_probs, micro_batch.engine_log_probs
            )

        _, micro_batches = self._micro_batches(experience)
        statistics = self._add_up(run_schedule(self._chunks, micro_batches, score))
        learning_rate = self._optimizer.param_groups[0]["lr"]
        _require_finite("loss", statistics.sums[0].item())
        _, grad_norm, _ = self._optimizer.step()
        _require_finite("gradient norm", float(grad_norm))
        self._scheduler.step(increment=1)
        return UpdateMetrics.of_step(statistics, len(experience), float(grad_norm), learning_rate)

    @torch.no_grad()
    def log_probs(self, experience: Experience) -> tuple[Tensor, ...]:
        """Log-probs of every sequence's scored tokens under the current weights.

        Returns:
            Per sequence [num_scored] float32 on the CPU, the same on every rank.
        """
        for chunk in self._chunks:
            chunk.eval()

        def score(micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            log_probs, _ = self._score(micro_batch, logits)
            return log_probs.sum(), log_probs.cpu().split(micro_batch.num_scored)

        indices, micro_batches = self._micro_batches(experience)
        kept = run_schedule(self._chunks, micro_batches, score, forward_only=True)
        mine = {i: values.clone() for plan, parts in zip(indices, kept) for i, values in zip(plan, parts)}
        everyone: list[dict[int, Tensor]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine if parallel_state.get_tensor_model_parallel_rank() == 0 else {})
        by_index = {i: values for part in everyone for i, values in part.items()}
        return tuple(by_index[i] for i in range(len(experience)))

    def hf_weights(self, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """The current weights as full HF tensors in buckets, in the parameters' dtype; see `stream_hf_weights`."""
        return stream_hf_weights(self._chunks, self._table, bucket_bytes, self._config.params_dtype)

    def export_hf(self, target: Path) -> None:
        """Write the current weights as an HF folder; see `export_hf_folder`."""
        export_hf_folder(self._chunks, self._table, self._folder, target, self._config.params_dtype)

    def save(self, folder: Path) -> None:
        """Write weights, optimizer, schedule and random states into an existing, empty folder; see `save_state`."""
        save_state(folder, self._chunks, self._optimizer, self._scheduler)

    def load(self, folder: Path, same_layout: bool) -> None:
        """Continue from what `save` wrote; see `load_state`."""
        load_state(folder, self._chunks, self._optimizer, self._scheduler, same_layout)

    def _micro_batches(self, experience: Experience) -> tuple[Sequence[Sequence[int]], list[MicroBatch]]:
        """This data-parallel rank's share: indices of the sequences, and the packed micro-batches of them."""
        lengths = [len(sequence.token_ids) for sequence in experience.sequences]
        plan = plan_micro_batches(
            lengths, parallel_state.get_data_parallel_world_size(), self._max_tokens, self._config.hidden_size
        )[parallel_state.get_data_parallel_rank()]
        weights = token_mean_weights([sequence.num_scored for sequence in experience.sequences])
        multiple_of = self._config.tensor_model_parallel_size if self._config.sequence_parallel else 1
        return plan, [pack(experience, weights, indices, multiple_of).to(self._device) for indices in plan]

    def _score(self, micro_batch: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [S] of a micro-batch from its logits [1, T, vocabulary shard]."""
        width = logits.shape[-1]
        first = width * parallel_state.get_tensor_model_parallel_rank()
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        shard = VocabularyShard(
            first=first,
            num_valid=min(max(self._vocab_size - first, 0), width),
            group=parallel_state.get_tensor_model_parallel_group() if ranks > 1 else None,
        )
        rows = logits.squeeze(0)
        return log_probs_and_entropy(
            rows, micro_batch.predicting_positions, micro_batch.targets, self._temperature, shard
        )

    def _add_up(self, parts: list[TokenStatistics]) -> TokenStatistics:
        """Over micro-batches and ranks; tensor-parallel ranks hold copies of the same, so only the first counts."""
        counts = parallel_state.get_tensor_model_parallel_rank() == 0
        return TokenStatistics.over_all_ranks(parts if counts else [], self._device)


def _require_finite(what: str, value: float) -> None:
    if not torch.isfinite(torch.tensor(value)):
        raise FloatingPointError(f"the {what} is {value}; the weights of the last checkpoint are untouched")
