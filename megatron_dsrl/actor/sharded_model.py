"""A sharded Megatron model, which scores sequences and accumulates gradients; and the same with its optimizer, which
actor and critic share.

Every method is collective over the ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dsrl.actor.forward_backward import MicroBatch, Result, run_schedule, sum_gradients
from megatron_dsrl.actor.micro_batch_plan import SequenceCost, plan_micro_batches
from megatron_dsrl.actor.offload import WITHOUT_CONTENT, ModelMemory, ModelPart
from megatron_dsrl.actor.optimizer import apply_settings, chained_optimizers, forget_state
from megatron_dsrl.actor.packing import PackedRow, RoutedExperts, RowSplit, pack
from megatron_dsrl.actor.saved_state import load_state, start_save
from megatron_dsrl.algorithms.experience import PerToken
from megatron_dsrl.algorithms.spaces import ScoredSequence
from megatron_dsrl.checkpoint.megatron_writer import CheckpointWrite
from megatron_dsrl.common.collective import gather
from megatron_dsrl.config.run import GatherOn
from megatron_dsrl.model.build import bare_model
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import WeightTable

AWAY = "a part of the model is in host memory: call onload() first"


class ShardedModel:
    """This rank's part of a model, wrapped for data parallelism."""

    def __init__(self, chunks: list[DistributedDataParallel], max_tokens_per_micro_batch: int) -> None:
        """`chunks` are this pipeline stage's, weights loaded."""
        self.chunks = chunks
        self.config = chunks[0].config
        self.config.finalize_model_grads_func = sum_gradients  # the loss weights already include the token count
        self.device = next(chunks[0].parameters()).device
        self._max_tokens = max_tokens_per_micro_batch

    def pack_share(
        self, sequences: Sequence[ScoredSequence], routed_experts: Sequence[str] | None = None
    ) -> list[PackedRow]:
        """This data-parallel rank's share of the batch as packed rows; every rank gets the same number of rows.

        The batch is the same on every rank; for `routed_experts` see `Experience.routed_experts`.
        """
        split = RowSplit(
            context_parallel_size=parallel_state.get_context_parallel_world_size(),
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
            sequence_parallel_size=self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1,
        )
        plan = plan_micro_batches(
            [split.padded(len(sequence.token_ids)) for sequence in sequences],
            parallel_state.get_data_parallel_world_size(),
            self._max_tokens,
            _sequence_cost(self.config),
            multiple_of=self.config.pipeline_model_parallel_size if len(self.chunks) > 1 else 1,
        )[parallel_state.get_data_parallel_rank()]
        experts = None
        if routed_experts is not None:
            experts = RoutedExperts(routed_experts, self.config.num_layers, self.config.moe_router_topk)
        return [pack(sequences, indices, split, self.device, experts) for indices in plan]

    def accumulate_gradients(self, micro_batches: Sequence[MicroBatch[Result]]) -> list[Result]:
        """Clear gradients, then run forward and backward; returns the kept results (last stage only)."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        return run_schedule(self.chunks, micro_batches)

    @torch.no_grad()
    def score_tokens(
        self,
        sequences: Sequence[ScoredSequence],
        score: Callable[[PackedRow, Any], Tensor],
        routed_experts: Sequence[str] | None = None,
    ) -> PerToken:
        """Compute one number per scored token with a forward pass over the whole batch. Returns [num_scored] per
        sequence, the same on every rank.

        Args:
            score: maps a packed row and the model's output at its predicting positions (see `MicroBatch.score`) to
                [sum(num_scored)] float32, the same on all ranks that hold shards of that row or output (see
                `PackedRow.assemble`).
        """
        for chunk in self.chunks:
            chunk.eval()
        rows = self.pack_share(sequences, routed_experts)
        micro_batches = [MicroBatch(row, _per_sequence(row, score)) for row in rows]
        kept = run_schedule(self.chunks, micro_batches, forward_only=True)
        mine = dict(pair for pairs in kept for pair in pairs)
        others_have_the_same = (
            parallel_state.get_tensor_model_parallel_rank() > 0 or parallel_state.get_context_parallel_rank() > 0
        )
        everyone = gather({} if others_have_the_same else mine)
        by_index = {i: values for part in everyone for i, values in part.items()}
        return tuple(by_index[i] for i in range(len(sequences)))


def _sequence_cost(config: TransformerConfig) -> SequenceCost:
    experts_per_token = config.moe_router_topk if config.num_moe_experts else 0
    feed_forward = experts_per_token * config.moe_ffn_hidden_size if experts_per_token else config.ffn_hidden_size
    return SequenceCost.for_layer(
        hidden_size=config.hidden_size,
        attention_heads=config.num_attention_heads,
        key_value_groups=config.num_query_groups,
        head_dim=config.kv_channels,
        feed_forward_size=feed_forward,
    )


def _per_sequence(
    row: PackedRow, score: Callable[[PackedRow, Any], Tensor]
) -> Callable[[Any], tuple[Tensor, list[tuple[int, Tensor]]]]:
    """Wrap `score` to keep a list of (index of the sequence, its scores)."""

    def split(output: Any) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        scores = score(row, output)
        parts = scores.cpu().split(row.num_scored)
        return scores.sum(), [(i, part.clone()) for i, part in zip(row.indices, parts)]

    return split


class TrainableModel(ShardedModel):
    """A sharded model with its optimizer and learning-rate schedule."""

    def __init__(
        self,
        chunks: list[DistributedDataParallel],
        table: WeightTable,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        max_tokens_per_micro_batch: int,
        gather_optimizer_on: GatherOn,
    ) -> None:
        super().__init__(chunks, max_tokens_per_micro_batch)
        self.table = table
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._gather_optimizer_on = gather_optimizer_on
        self.memory = ModelMemory(self._tensors_of_parts)
        """Device memory of the model. Streaming weights needs only the parameters, saving also the optimizer's state;
        everything else needs all parts."""

    @property
    def implementations(self) -> dict[str, str]:
        """Classes used for the layers and the optimizer, each prefixed with its package."""
        layer = bare_model(self.chunks[0]).decoder.layers[0]
        parts = {
            "core attention": layer.self_attention.core_attention,
            "matrix products": layer.self_attention.linear_qkv,  # Transformer Engine's includes the norm before it
            "norm": layer.input_layernorm,
            "optimizer": chained_optimizers(self._optimizer)[0].optimizer,
        }
        return {name: f"{type(part).__module__.split('.')[0]}.{type(part).__name__}" for name, part in parts.items()}

    def score_tokens(
        self,
        sequences: Sequence[ScoredSequence],
        score: Callable[[PackedRow, Any], Tensor],
        routed_experts: Sequence[str] | None = None,
    ) -> PerToken:
        assert not self.memory.away, AWAY
        return super().score_tokens(sequences, score, routed_experts)

    def accumulate_gradients(self, micro_batches: Sequence[MicroBatch[Result]]) -> list[Result]:
        assert not self.memory.away, AWAY
        self._optimizer.zero_grad()
        return super().accumulate_gradients(micro_batches)

    def take_step(self) -> tuple[float, float]:
        """Apply the accumulated gradients; returns their norm before clipping and the learning rate used. Raises
        FloatingPointError if the norm is not finite."""
        assert not self.memory.away, AWAY
        learning_rate = self._optimizer.param_groups[0]["lr"]
        _, grad_norm, _ = self._optimizer.step()
        require_finite("gradient norm", float(grad_norm))
        self._scheduler.step(increment=1)
        return float(grad_norm), learning_rate

    def configure_optimizer(self, learning_rate: float, gradient_clip_norm: float) -> None:
        """Set the peak learning rate and the clipping norm (0 for none) from the next step on; see `apply_settings`."""
        apply_settings(self._optimizer, self._scheduler, learning_rate, gradient_clip_norm)

    def reset_optimizer(self) -> None:
        """Reset Adam's moments and step counts. The learning-rate schedule continues."""
        assert not self.memory.away, AWAY
        forget_state(self._optimizer)

    def hf_weights(self, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """The current weights, merged with adapters, as full HF tensors in buckets, in the parameters' dtype; see
        `stream_hf_weights`. Those of a value model are a Transformers token classifier with one label."""
        return stream_hf_weights(self.chunks, self.table, bucket_bytes, self.config.params_dtype)

    def start_save(self, folder: Path, copy: bool) -> CheckpointWrite:
        """Prepare to write weights, optimizer, schedule and random states; see `saved_state.start_save`."""
        assert set(self.memory.away) <= set(WITHOUT_CONTENT), AWAY
        return start_save(folder, self.chunks, self._optimizer, self._scheduler, self._gather_optimizer_on, copy)

    def load(self, folder: Path, same_layout: bool) -> None:
        """Restore a saved state; see `load_state`."""
        assert not self.memory.away, AWAY
        load_state(folder, self.chunks, self._optimizer, self._scheduler, same_layout)

    def _tensors_of_parts(self) -> Mapping[ModelPart, Iterable[Tensor]]:
        """Tensors by part. In float32 the optimizer holds the model's parameters or views of them; these count as
        parameters."""
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        optimizers = [part.optimizer for part in chained_optimizers(self._optimizer)]
        masters = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
        states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
        return {
            "parameters": parameters,
            "gradients": [parameter.main_grad for parameter in parameters if parameter.requires_grad],
            "optimizer": [*masters, *(value for value in states if isinstance(value, Tensor))],
        }


def require_finite(what: str, value: float) -> None:
    """Raise FloatingPointError unless the value is finite."""
    if not torch.isfinite(torch.tensor(value)):
        raise FloatingPointError(f"the {what} is {value}; the weights of the last checkpoint are untouched")
