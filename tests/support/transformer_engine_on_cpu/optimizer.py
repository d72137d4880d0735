"""Transformer Engine's kernels over lists of tensors in PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["multi_tensor_adam", "multi_tensor_l2norm", "multi_tensor_scale", "multi_tensor_scale_tensor"]


def multi_tensor_adam(
    chunk_size: int,
    overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One step of AdamW on gradients, parameters and both moments, in place and in float32."""
    assert decoupled and len(lists) == 4, "the project's optimizer keeps its own float32 weights"
    first_correction = 1 - beta1**step if bias_correction else 1.0
    second_correction = 1 - beta2**step if bias_correction else 1.0
    for grad, parameter, first, second in zip(*lists, strict=True):
        grad = grad.float()
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (first / first_correction) / ((second / second_correction).sqrt() + eps)
        parameter.sub_(learning_rate * (update + weight_decay * parameter))


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Norm of all tensors together, [1], and on request of each."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm()[None], norms if per_tensor else torch.empty(0)


def multi_tensor_scale(chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: float) -> None:
    """Write each tensor of the first list, times `scale`, into its counterpart in the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_scale_tensor(
    chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: Tensor
) -> None:
    """`multi_tensor_scale` by a factor on the device."""
    multi_tensor_scale(chunk_size, overflow, lists, float(scale))
