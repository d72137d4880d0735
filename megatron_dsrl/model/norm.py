"""RMSNorm for Megatron's local layer specification."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm, usable under sequence parallelism.

    Megatron's norm for local layers, WrappedTorchNorm, does not support sequence parallelism. All it lacks is the
    attribute on the weight that makes `finalize_model_grads` sum its gradient over tensor-parallel ranks, each of which
    normalises a different part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's convention
