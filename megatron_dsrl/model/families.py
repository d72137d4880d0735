"""The supported HF architectures and their distinguishing features.

They share everything else: RMSNorm before attention and feed-forward, grouped query attention with rotary embeddings on
the whole head, SwiGLU, no other biases, no dropout. To add another architecture of this kind, add an entry here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The distinguishing features of one HF architecture."""

    hf_name: str
    """Name in `architectures` of config.json."""
    qk_layernorm: bool
    """RMSNorm on each head's query and key."""
    qkv_bias: bool
    """Biases in the query, key and value projections."""
    has_experts: bool = False
    """A mixture of experts as feed-forward in every layer."""
    default_head_dim: int | None = None
    """Default if config.json gives none; None means hidden size / heads."""
    default_rope_theta: float | None = None
    """Default if config.json gives none; None means that it must."""


FAMILIES = {
    family.hf_name: family
    for family in (
        Family("Qwen3ForCausalLM", qk_layernorm=True, qkv_bias=False, default_head_dim=128),
        Family("Qwen3MoeForCausalLM", qk_layernorm=True, qkv_bias=False, has_experts=True, default_head_dim=128),
        Family("Qwen2ForCausalLM", qk_layernorm=False, qkv_bias=True),  # also the name of Qwen2.5
        # Llama 2 and 3, and others with their layers, such as SmolLM2. Llama 2's config.json may lack the RoPE base.
        Family("LlamaForCausalLM", qk_layernorm=False, qkv_bias=False, default_rope_theta=1e4),
    )
}
