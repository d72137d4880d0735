"""Apply the output layer to selected rows only.

Only positions that predict a scored token need logits, not prompts and padding. With a vocabulary of 150,000 the logits
are the largest tensor of a step, so rows are selected before computing them. Pass the function to Megatron's GPTModel
as `output_processor`.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def output_at_rows(
    *,
    hidden_states: Tensor,
    output_layer: torch.nn.Module,
    output_weight: Tensor | None,
    context: Tensor,
    config: TransformerConfig,
    **_: Any,
) -> Tensor:
    """Outputs of the output layer at the selected rows.

    Args:
        hidden_states: [t, 1, h]; under sequence parallelism this rank's part.
        output_layer: Megatron's vocabulary-parallel layer, or a layer that every tensor-parallel rank holds in full and
            that returns (output, bias) as Megatron's layers do.
        output_weight: the embedding if it is tied to the output layer, else None.
        context: [n] int64, the selected rows out of t.

    Returns:
        [n, output size of this rank].
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
    # As ColumnParallelLinear, without gathering the sequence.
    return linear_with_grad_accumulation_and_async_allreduce(
        input=hidden,
        weight=output_layer.weight if output_weight is None else output_weight,
        bias=None,
        # apex's kernel is not made for a matrix product over zero rows.
        gradient_accumulation_fusion=config.gradient_accumulation_fusion and len(hidden) > 0,
        allreduce_dgrad=False,
        sequence_parallel=False,
    )
