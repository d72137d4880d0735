"""The output layer at selected rows only.

Only positions that predict a scored token need an output, not prompts and padding, so their rows are selected first.
Pass `output_at_rows` to Megatron's GPTModel as `output_processor`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass(frozen=True)
class FactoredLogits:
    """Logits of n tokens, hidden @ weight^T, which are too large to exist as a whole; see `actor/log_probs.py`."""

    hidden: Tensor
    """[n, hidden size], the same on all tensor-parallel ranks. The gradient passed back is that of this rank's columns;
    it is summed over the ranks here."""
    weight: Tensor
    """[columns of this rank, hidden size]."""
    fused_gradient: bool
    """Whether the gradient of the weight goes into its main gradient (Megatron's `gradient_accumulation_fusion`)."""


def output_at_rows(
    *,
    hidden_states: Tensor,
    output_layer: torch.nn.Module,
    output_weight: Tensor | None,
    context: Tensor,
    config: TransformerConfig,
    **_: Any,
) -> FactoredLogits | Tensor:
    """Outputs of the output layer at the selected rows.

    Args:
        hidden_states: [t, 1, h]; under sequence parallelism this rank's part.
        output_layer: Megatron's vocabulary-parallel layer, or a layer that every tensor-parallel rank holds in full and
            that returns (output, bias) as Megatron's layers do.
        output_weight: the embedding if it is tied to the output layer, else None.
        context: [n] int64, the selected rows out of t.

    Returns:
        The factors of the logits of a vocabulary-parallel layer; [n, output size] for any other.
    """
    is_split = isinstance(output_layer, ColumnParallelLinear)
    hidden = hidden_states.squeeze(1)
    if config.sequence_parallel:
        # Each rank has the gradient from its own columns only, or all ranks have the same gradient.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=is_split)
        hidden = hidden.index_select(0, context)
    else:
        hidden = hidden.index_select(0, context)
        hidden = copy_to_tensor_model_parallel_region(hidden) if is_split else hidden
    if not is_split:
        return output_layer(hidden)[0]
    weight = output_layer.weight if output_weight is None else output_weight
    assert isinstance(weight, Tensor)
    # apex's kernel does not support a matrix product over zero rows.
    return FactoredLogits(hidden, weight, config.gradient_accumulation_fusion and len(hidden) > 0)
