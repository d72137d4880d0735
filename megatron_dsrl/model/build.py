"""Build a decoder of a supported family (model/architecture.py) as a Megatron-core GPTModel.

In Megatron's terms: RMSNorm before attention and feed-forward, grouped query attention, RMSNorm on each head's query
and key if the family has it, rotary embeddings on the whole head (plain, YaRN or Llama 3's), SwiGLU or SwiGLU
experts, no dropout.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_dsrl.config.layout import model_problems, refuse
from megatron_dsrl.config.model import ModelConfig, ParallelConfig, RouterConfig
from megatron_dsrl.model.architecture import Architecture, Experts
from megatron_dsrl.model.layer_spec import LayerImplementation, choose_layer_implementation, decoder_layers
from megatron_dsrl.model.rope import Llama3Scaling, Yarn
from megatron_dsrl.platform import current_platform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUTER_DTYPES = {"float32": "fp32", "float64": "fp64", "model": None}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
# With two stages, each one is both before and after the other. Batched exchanges in both directions would be mixed up:
# a shape sent forwards would be received as one from the next stage.
INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}


def transformer_config(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron's configuration for the model in this layout; see `build_model`."""
    dtype, virtual_stages = DTYPES[model.dtype], parallel.virtual_pipeline_stages
    implementation = choose_layer_implementation(model.layer_spec, model.dtype)
    platform_flags = current_platform().transformer_config_flags(implementation == "transformer_engine")
    if isinstance(architecture.rope_scaling, Yarn):
        platform_flags |= {"apply_rope_fusion": False}  # Transformer Engine's kernel has no attention factor
    config = TransformerConfig(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        qk_layernorm=architecture.family.qk_layernorm,
        add_qkv_bias=architecture.family.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        init_method_std=architecture.initializer_range,
        perform_initialization=False,  # weights are always loaded, or made by weights/load.py
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages if virtual_stages > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.layers_in_first_stage,
        num_layers_in_last_pipeline_stage=parallel.layers_in_last_stage,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # the default rejects variable lengths, even without experts
        calculate_per_token_loss=True,  # the loss function sums; the actor divides by the global token count
        **_expert_fields(architecture.experts, model.router, parallel, implementation),
        **RECOMPUTE[model.recompute],
        **platform_flags | (INTERLEAVED if virtual_stages > 1 else {}),
    )
    if isinstance(architecture.rope_scaling, Yarn):
        for name, value in _yarn_attributes(architecture.rope_scaling).items():
            setattr(config, name, value)
    return config


def _yarn_attributes(yarn: Yarn) -> dict[str, Any]:
    """What Megatron reads from its configuration for YaRN, though the class does not declare it."""
    return {
        "yarn_rotary_scaling_factor": yarn.factor,
        "yarn_original_max_position_embeddings": yarn.original_max_position_embeddings,
        "yarn_beta_fast": yarn.beta_fast,
        "yarn_beta_slow": yarn.beta_slow,
        "yarn_mscale": None,  # then it has Yarn.attention_factor
        "yarn_mscale_all_dim": None,
        "yarn_correction_range_round_to_int": True,
    }


def _expert_fields(
    experts: Experts | None, router: RouterConfig, parallel: ParallelConfig, implementation: LayerImplementation
) -> dict[str, Any]:
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.moe_intermediate_size,
        "moe_router_topk": experts.num_experts_per_tok,
        # Softmax over the chosen experts' logits equals softmax over all experts, divided by the sum of the chosen.
        "moe_router_pre_softmax": not experts.norm_topk_prob,
        "moe_router_dtype": ROUTER_DTYPES[router.dtype],
        "moe_router_load_balancing_type": "none",  # model/router.py computes the losses
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": implementation == "transformer_engine",
        "expert_model_parallel_size": parallel.expert_parallel_size,
        "expert_tensor_parallel_size": parallel.split_of_experts,
    }


def build_model(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> list[MegatronModule]:
    """Build this process's part of the model; `initialize_parallel` must have run.

    Parameters are not initialised; weights/load.py loads them or draws them at random. Raises UserError if the layout
    does not divide the model, or Transformer Engine is requested but unavailable.

    Returns:
        The `parallel.virtual_pipeline_stages` chunks of this pipeline stage, each a GPTModel, inside a Float16Module
        for bfloat16. Inputs are token ids [b, s], position ids [b, s], no mask, and `packed_seq_params` for packed
        rows. The last stage returns logits [b, s, padded vocabulary / tensor-parallel size]. Under context parallelism
        s counts this rank's tokens (model/context_parallel.py).
    """
    refuse(model_problems(parallel, architecture.shape))
    config, virtual_stages = transformer_config(architecture, model, parallel), parallel.virtual_pipeline_stages
    implementation = choose_layer_implementation(model.layer_spec, model.dtype)
    chunks = []
    for stage in range(virtual_stages) if virtual_stages > 1 else [None]:
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=decoder_layers(config, implementation, stage),
            vocab_size=architecture.padded_vocab_size(parallel.tensor_parallel_size),
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="yarn" if isinstance(architecture.rope_scaling, Yarn) else "rope",
            rotary_base=architecture.rope_theta,
            vp_stage=stage,
        ).to(current_platform().device)
        if isinstance(architecture.rope_scaling, Llama3Scaling):
            # GPTModel passes only the factor to this function, and leaves the other three at Llama 3.1's values
            rope = chunk.rotary_pos_emb
            rope.inv_freq = rope._apply_scaling(rope.inv_freq, **asdict(architecture.rope_scaling))
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def build_trainable(chunks: list[MegatronModule], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Wrap chunks for training: gradients accumulate in fp32 `main_grad` buffers and are reduced over data-parallel
    ranks.

    Load weights first: the wrapper moves parameters into its buffers, and the optimizer then copies them.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=False,
        check_for_nan_in_grad=False,  # the actor checks the loss and the gradient norm
    )
    return [DistributedDataParallel(config=chunks[0].config, ddp_config=ddp_config, module=chunk) for chunk in chunks]


def bare_model(chunk: nn.Module) -> GPTModel:
    """The GPTModel inside the wrappers for bfloat16 and data parallelism."""
    return unwrap_model(chunk)


class ValueHead(MegatronModule):
    """Linear layer hidden -> 1 with a bias, computed in fp32 for any parameter dtype.

    Every tensor-parallel rank holds it in full and gets the same hidden states, so its gradient is the same on all
    ranks without a reduction.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """[..., hidden] -> [..., 1] float32, and None as the bias still to be added (Megatron's convention)."""
        return F.linear(hidden.float(), self.weight.float(), self.bias.float()), None


def build_value_model(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> list[MegatronModule]:
    """Like `build_model`, with a `ValueHead` as output layer of the last stage.

    The embedding is never tied: the value head has no vocabulary to share with it.
    """
    chunks = build_model(replace(architecture, tie_word_embeddings=False), model, parallel)
    for chunk in chunks:
        bare = bare_model(chunk)
        if bare.post_process:
            bare.output_layer = ValueHead(bare.config).to(current_platform().device)
    return chunks
