"""The projections of a decoder's layers that can have LoRA adapters: PEFT's names, sizes, and Megatron's layers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_dsrl.model.architecture import Architecture


@dataclass(frozen=True)
class Projection:
    """A matrix [out_size, in_size] of every layer in HF checkpoints; Megatron may fuse it with others."""

    name: str
    """Name in HF checkpoints and in PEFT's `target_modules`."""
    hf_module: str
    """Module that contains it in HF's layers."""
    linear: str
    """Linear layer that contains it in Megatron's layers."""
    out_size: int
    in_size: int

    @property
    def is_row_parallel(self) -> bool:
        """Whether tensor parallelism splits it by inputs. Otherwise it splits it by outputs."""
        return self.linear.endswith(("linear_proj", "linear_fc2"))


def projections(architecture: Architecture, names: Collection[str] | None = None) -> list[Projection]:
    """The projections of these names (None: all), in Megatron's order within each linear layer.

    A mixture of experts has those of attention only.
    """
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    queries = architecture.num_attention_heads * architecture.head_dim
    keys = architecture.num_key_value_heads * architecture.head_dim
    attention: Sequence[Projection] = [
        Projection("q_proj", "self_attn", "self_attention.linear_qkv", queries, hidden),
        Projection("k_proj", "self_attn", "self_attention.linear_qkv", keys, hidden),
        Projection("v_proj", "self_attn", "self_attention.linear_qkv", keys, hidden),
        Projection("o_proj", "self_attn", "self_attention.linear_proj", hidden, queries),
    ]
    feed_forward: Sequence[Projection] = [
        Projection("gate_proj", "mlp", "mlp.linear_fc1", inner, hidden),
        Projection("up_proj", "mlp", "mlp.linear_fc1", inner, hidden),
        Projection("down_proj", "mlp", "mlp.linear_fc2", hidden, inner),
    ]
    known = attention if architecture.experts else [*attention, *feed_forward]
    return [projection for projection in known if names is None or projection.name in names]
