"""Choose the implementation of Megatron's layers: Transformer Engine or plain PyTorch."""

from typing import Literal

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.model.attention import CoreAttention, PackedSelfAttention
from megatron_dsrl.model.router import Router
from megatron_dsrl.model.routing_replay import RoutedTransformerLayer
from megatron_dsrl.platform import current_platform


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm, usable under sequence parallelism.

    Megatron's norm for local layers, WrappedTorchNorm, does not support sequence parallelism. All it lacks is the
    attribute on the weight that makes `finalize_model_grads` sum its gradient over tensor-parallel ranks, each of which
    normalises a different part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's convention


LayerImplementation = Literal["local", "transformer_engine"]


def transformer_engine_is_usable() -> bool:
    """Whether Megatron could import Transformer Engine and the device has its attention for packed rows.

    An installed `transformer_engine` package proves neither: on PyPI it is an empty metapackage.
    """
    return HAVE_TE and current_platform().attends_to_packed_rows


def choose_layer_implementation(
    wanted: Literal["auto", "local", "transformer_engine"], dtype: Literal["float32", "bfloat16"]
) -> LayerImplementation:
    """Resolve `model.layer_spec` for a model of this dtype. Raises UserError if Transformer Engine is requested but
    unavailable.

    `auto` uses Transformer Engine only for 16-bit dtypes: its attention for packed rows (flash, cuDNN) supports no
    other.
    """
    if wanted == "local":
        return "local"
    usable = transformer_engine_is_usable()
    if wanted == "transformer_engine" and not usable:
        raise UserError(
            "model.layer_spec: transformer_engine needs the transformer-engine[pytorch] package and a GPU of Hopper's "
            "generation or newer (on an A100 also flash-attn); use auto or local"
        )
    if wanted == "transformer_engine":
        return "transformer_engine"
    return "transformer_engine" if usable and dtype == "bfloat16" else "local"


def decoder_layers(
    config: TransformerConfig, implementation: LayerImplementation, virtual_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Layer specification of this pipeline stage, or of one of its virtual stages."""
    experts = config.num_moe_experts
    if implementation == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
        if experts:
            _use_own_router(layer)
        return layer
    layer = get_gpt_layer_local_spec(
        num_experts=experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention
    attention.module = PackedSelfAttention
    attention.submodules.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.submodules.q_layernorm = RMSNorm
        attention.submodules.k_layernorm = RMSNorm
    if experts:
        _use_own_router(layer)
        # In checkpoints, local layers use Transformer Engine's names for norms. It fuses this norm into a dense
        # feed-forward but not into experts, which Megatron's map overlooks. With the entry, names would differ.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layers = [layer] * get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _use_own_router(layer: ModuleSpec) -> None:
    """Use our layer and router, which support routing replay and router losses."""
    layer.module = RoutedTransformerLayer
    layer.submodules.mlp.keywords["submodules"].router = Router
