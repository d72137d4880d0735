"""RMSNorm for Megatron's local layer specification."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm, usable under sequence parallelism.

    Megatron's own choice for local layers, WrappedTorchNorm, refuses sequence parallelism. All that it lacks is the
    mark on the weight that makes `finalize_model_grads` add up its gradient over the tensor-parallel processes, each
    of which normalises another part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
