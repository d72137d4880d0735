"""A sharded Megatron model with its optimizer: the part shared by actor and critic.

Every method is collective over the ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_dsrl.actor.forward_backward import MicroBatch, Result
from megatron_dsrl.actor.offload import WITHOUT_CONTENT, ModelMemory, ModelPart
from megatron_dsrl.actor.optimizer import apply_settings, chained_optimizers, forget_state
from megatron_dsrl.actor.packing import PackedRow
from megatron_dsrl.actor.saved_state import load_state, start_save
from megatron_dsrl.actor.sharded_model import ShardedModel
from megatron_dsrl.algorithms.experience import PerToken
from megatron_dsrl.algorithms.spaces import ScoredSequence
from megatron_dsrl.checkpoint.megatron_writer import CheckpointWrite
from megatron_dsrl.config.run import GatherOn
from megatron_dsrl.model.build import bare_model
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import WeightTable

AWAY = "a part of the model is in host memory: call onload() first"


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
