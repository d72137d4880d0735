"""LoRA (arXiv 2106.09685): trained low-rank adapters beside frozen linear layers of Megatron.

Every projection of the HF model has its own matrices A [rank, in] and B [out, rank], as in PEFT, although Megatron
computes queries, keys and values in one layer, and gate and up in another. Megatron-Bridge calls this canonical LoRA.

Under tensor parallelism one of the two matrices is split as the layer's weight is, and the other is whole on every
rank: beside a column-parallel layer B is split by outputs, beside a row-parallel one A by inputs. Ranks only exchange
activations with `rank` columns. Under sequence parallelism each rank applies the whole matrix to its part of the
sequence, so Megatron has to sum the matrix's gradient over the ranks (the attribute `sequence_parallel`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_dsrl.config.actor import LoraConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.model.build import bare_model
from megatron_dsrl.model.projections import projections

SUFFIX = "_adapter"
"""An adapter is registered beside its linear layer, under the layer's name with this suffix."""


class Adapter(MegatronModule):
    """The adapters of the projections in one linear layer; parameters are not initialised."""

    def __init__(
        self, config: TransformerConfig, architecture: Architecture, linear: str, lora: LoraConfig, device: torch.device
    ) -> None:
        """`linear` is that of a `Projection`; one of its projections must be in `lora.target_modules`."""
        super().__init__(config)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        fused = [each for each in projections(architecture) if each.linear == linear]
        targets = [each for each in fused if each.name in lora.target_modules]
        self._scale = lora.alpha / lora.rank
        self._is_row_parallel = fused[0].is_row_parallel
        self._out_sizes = {each.name: each.out_size // (1 if self._is_row_parallel else ranks) for each in fused}
        """This rank's outputs of every projection of the layer, in Megatron's order."""
        self._blocks = architecture.num_key_value_heads // ranks if "q_proj" in self._out_sizes else 1
        """Megatron interleaves queries, keys and values by query group."""

        def matrices(shape: Mapping[str, tuple[int, int]], split_dim: int | None) -> nn.ParameterDict:
            """Uninitialised matrices of this rank; `shape` has their whole shapes."""
            parameters = nn.ParameterDict()
            for name, whole in shape.items():
                sizes = [size // ranks if dim == split_dim else size for dim, size in enumerate(whole)]
                matrix = nn.Parameter(torch.empty(sizes, dtype=config.params_dtype, device=device))
                tensor_parallel.set_tensor_model_parallel_attributes(matrix, split_dim is not None, split_dim or 0, 1)
                sums_over_sequence = config.sequence_parallel and split_dim is None
                matrix.sequence_parallel = sums_over_sequence  # type: ignore[attr-defined]  # Megatron's convention
                parameters[name] = matrix
            return parameters

        row = self._is_row_parallel
        self.lora_A = matrices({each.name: (lora.rank, each.in_size) for each in targets}, 1 if row else None)
        self.lora_B = matrices({each.name: (each.out_size, lora.rank) for each in targets}, None if row else 0)

    def forward(self, x: Tensor) -> Tensor:
        """What the adapters add to the layer's output, in the layer's shapes: [s, b, in of this rank] -> [s, b, out of
        this rank]. Under sequence parallelism the input of a column-parallel layer, and the output of a row-parallel
        one, are this rank's part of the sequence."""
        names = list(self.lora_A)
        hidden = F.linear(x, torch.cat([self.lora_A[name] for name in names])) * self._scale
        parts = self._exchange(hidden).chunk(len(names), -1)
        return self._fused({name: F.linear(part, self.lora_B[name]) for name, part in zip(names, parts)})

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """This rank's shard of W + alpha / rank * B A, computed in float32, in the dtype of W; W stays as it is."""
        products = {name: (self.lora_B[name].float() @ a.float()).T for name, a in self.lora_A.items()}
        return (weight.float() + self._scale * self._fused(products).T).to(weight.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Megatron's description of the parameters for distributed checkpoints."""
        state = self.state_dict(prefix="", keep_vars=True)
        split, dim = ("lora_A.", 1) if self._is_row_parallel else ("lora_B.", 0)
        axes = {name: dim for name in state if name.startswith(split)}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)

    def _exchange(self, hidden: Tensor) -> Tensor:
        """Make A's output what the ranks' parts of B need: the sum over input shards beside a row-parallel layer, and
        all of the sequence beside a column-parallel one."""
        if self._is_row_parallel:
            if self.config.sequence_parallel:
                return tensor_parallel.reduce_scatter_to_sequence_parallel_region(hidden)
            return tensor_parallel.reduce_from_tensor_model_parallel_region(hidden)
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(hidden)
        return tensor_parallel.copy_to_tensor_model_parallel_region(hidden)

    def _fused(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Join the projections' outputs [..., out] in Megatron's order; zeros for projections without an adapter."""
        if len(self._out_sizes) == 1:
            return next(iter(parts.values()))
        some = next(iter(parts.values()))
        whole = [
            parts[name] if name in parts else some.new_zeros(*some.shape[:-1], size)
            for name, size in self._out_sizes.items()
        ]
        return torch.cat([part.unflatten(-1, (self._blocks, -1)) for part in whole], -1).flatten(-2)


def add_adapters(chunks: Sequence[MegatronModule], architecture: Architecture, lora: LoraConfig) -> None:
    """Freeze a model and put adapters beside its linear layers, before it is wrapped for data parallelism.

    The adapters' parameters are not initialised; fill them through their weight table (weights/peft.py).
    """
    for chunk in chunks:
        model = bare_model(chunk)
        model.requires_grad_(False)
        device = next(model.parameters()).device
        for layer in model.decoder.layers:
            for linear, _ in groupby(projections(architecture, lora.target_modules), lambda each: each.linear):
                parent, _, name = linear.rpartition(".")
                adapter = Adapter(model.config, architecture, linear, lora, device)
                layer.get_submodule(parent).register_module(f"{name}{SUFFIX}", adapter)
                layer.get_submodule(linear).register_forward_hook(partial(_add_output, adapter))
        if model.pre_process and model.config.recompute_granularity == "full":
            # Recomputation gives gradients only to a layer whose input needs one, and frozen embeddings need none.
            model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def adapters_by_weight(chunks: Sequence[nn.Module]) -> dict[nn.Parameter, Adapter]:
    """The adapters of this rank's chunks, by the weight of their linear layers; empty without LoRA."""
    adapters: dict[nn.Parameter, Adapter] = {}
    for parent in (module for chunk in chunks for module in chunk.modules()):
        for name, adapter in parent.named_children():
            if isinstance(adapter, Adapter):
                weight = parent.get_submodule(name.removesuffix(SUFFIX)).weight
                assert isinstance(weight, nn.Parameter)
                adapters[weight] = adapter
    return adapters


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix."""
    return f"{SUFFIX}.lora_" in name


def _add_output(
    adapter: Adapter, linear: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Forward hook of a linear layer, which returns its output and the bias still to be added."""
    (x,) = inputs
    norm = getattr(linear, "layer_norm_weight", None)
    if norm is not None:  # Transformer Engine computes the norm within the layer and does not return its output
        x = F.rms_norm(x, norm.shape, norm, adapter.config.layernorm_epsilon)
    return output[0] + adapter(x), output[1]
