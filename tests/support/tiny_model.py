"""Tiny models as HF folders: real architectures, random weights, no tokenizer."""

from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-6,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
"""128 tokens extended to the 512 of `SIZES`."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""64 tokens extended to 512. Of 8 frequencies, as in heads of dimension 16, 1 stays, 2 are interpolated, 5 divided."""
HEAD_DIM = 32
"""Head dimension of both Qwen3 families; not hidden size / heads, which is 16."""


LONG_CONTEXT_TOKENS = 4096
"""A response that fills it takes an engine on CPU more than eight seconds: enough to interrupt it on a busy machine."""


class WeightOptions(TypedDict, total=False):
    """Options of all tiny models."""

    seed: int
    """Seed of the weights; 0 by default."""
    dtype: torch.dtype
    """Dtype of the weights; float32 by default."""
    max_shard_size: str
    """Size of one weight file, as `save_pretrained` takes it; 1GB by default."""


def make_tiny_qwen3(
    folder: Path,
    *,
    tied: bool,
    vocab_size: int = 128,
    head_dim: int = HEAD_DIM,
    context_tokens: int = 512,
    rope: dict[str, Any] | None = None,
    **options: Unpack[WeightOptions],
) -> Qwen3ForCausalLM:
    """Write a dense Qwen3 with `save_pretrained` and return it.

    4 layers, 4 query heads in 2 groups of dimension 32, RoPE base 1e6. Weights are large and norms differ from one, so
    that a wrongly placed tensor shows.

    Args:
        folder: created if missing.
        tied: input embedding and output head are one tensor.
        vocab_size: rows of the embedding.
        head_dim: attention kernels on GPUs are made for 64, 128 and 256.
        context_tokens: longest sequence; `LONG_CONTEXT_TOKENS` for tests that interrupt a response.
        rope: `rope_parameters` of config.json; None: plain.
        options: see `WeightOptions`.
    """
    sizes = SIZES | {"max_position_embeddings": context_tokens} | ({} if rope is None else {"rope_parameters": rope})
    config = Qwen3Config(**sizes, vocab_size=vocab_size, head_dim=head_dim, tie_word_embeddings=tied)
    return _write(Qwen3ForCausalLM, config, folder, **options)


def make_tiny_qwen3_yarn(folder: Path, **options: Any) -> Qwen3ForCausalLM:
    """A dense Qwen3 whose context YaRN extends from 128 to 512 tokens; options of `make_tiny_qwen3`."""
    return make_tiny_qwen3(folder, rope=YARN, **options)


def make_tiny_qwen3_moe(
    folder: Path, *, vocab_size: int = 128, **options: Unpack[WeightOptions]
) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE: like the dense one, untied, with 4 experts of inner size 48 in every layer, 2 of them per token."""
    config = Qwen3MoeConfig(
        **SIZES,
        vocab_size=vocab_size,
        head_dim=HEAD_DIM,
        tie_word_embeddings=False,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    return _write(Qwen3MoeForCausalLM, config, folder, **options)


def make_tiny_qwen2(folder: Path, *, vocab_size: int = 128, **options: Unpack[WeightOptions]) -> Qwen2ForCausalLM:
    """A Qwen2.5: biases on queries, keys and values, no norms on them, tied, heads of dimension 16."""
    config = Qwen2Config(**SIZES, vocab_size=vocab_size, tie_word_embeddings=True, use_sliding_window=False)
    return _write(Qwen2ForCausalLM, config, folder, **options)


def make_tiny_llama(
    folder: Path,
    *,
    tied: bool,
    vocab_size: int = 128,
    rope: dict[str, Any] | None = None,
    **options: Unpack[WeightOptions],
) -> LlamaForCausalLM:
    """A Llama: no biases, no norms on queries and keys, heads of dimension 16; options as `make_tiny_qwen3`."""
    sizes = SIZES if rope is None else SIZES | {"rope_parameters": rope}
    config = LlamaConfig(**sizes, vocab_size=vocab_size, tie_word_embeddings=tied)
    return _write(LlamaForCausalLM, config, folder, **options)


def make_tiny_llama3(folder: Path, **options: Any) -> LlamaForCausalLM:
    """A tied Llama whose context is extended from 64 to 512 tokens as in Llama 3.2; options of `make_tiny_llama`."""
    return make_tiny_llama(folder, tied=True, rope=LLAMA3, **options)


def _write(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
) -> PreTrainedModel:
    model = model_class(config)
    _fill(model, seed)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.08 * noise)
