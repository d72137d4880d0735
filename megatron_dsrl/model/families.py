"""The HF architectures that can be trained and converted, and what sets each apart.

They share everything else: RMSNorm before attention and feed-forward, grouped query attention with rotary positions on
the whole head, SwiGLU, no other biases, no dropout. A further architecture of this kind is one entry here and one table
in weights/tables.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The distinguishing features of one HF architecture."""

    hf_name: str
    """As `architectures` in config.json names it."""
    qk_layernorm: bool
    """RMSNorm on every head's query and key."""
    qkv_bias: bool
    """Query, key and value projections have biases."""
    has_experts: bool = False
    """Every layer's feed-forward is a mixture of experts."""
    default_head_dim: int | None = None
    """Where config.json names none; None: hidden size / heads."""


FAMILIES = {
    family.hf_name: family
    for family in (
        Family("Qwen3ForCausalLM", qk_layernorm=True, qkv_bias=False, default_head_dim=128),
        Family("Qwen3MoeForCausalLM", qk_layernorm=True, qkv_bias=False, has_experts=True, default_head_dim=128),
        Family("Qwen2ForCausalLM", qk_layernorm=False, qkv_bias=True),  # Qwen2.5 carries this name too
    )
}
