"""A tiny Qwen3 as an HF folder: real architecture, random weights, no tokenizer."""

from pathlib import Path

import torch

from megatron_dsrl.platform.engine import prepare_engine_process

prepare_engine_process()  # without CUDA: Transformers' models import torchvision, which fails to import there
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402


def make_tiny_qwen3(
    folder: Path,
    *,
    tied: bool,
    vocab_size: int = 128,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
) -> Qwen3ForCausalLM:
    """Write the model with `save_pretrained` and return it.

    4 layers, 4 query heads in 2 groups of dimension 32 (unlike hidden size / heads = 16), RoPE base 1e6. Weights are
    large and norms differ from one, so that a wrongly placed tensor shows.

    Args:
        folder: where; made if need be.
        tied: input embedding and output head are one tensor.
        vocab_size: rows of the embedding.
        seed: of the weights.
        dtype: of the weights.
        max_shard_size: size of one weight file, as `save_pretrained` takes it.
    """
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.08 * noise)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
