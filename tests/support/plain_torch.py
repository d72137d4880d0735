"""Megatron's training in plain torch, for comparison."""

import torch
from torch import nn

from megatron_dsrl.config.actor import OptimizerConfig


def adamw(model: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over a model's parameters. Megatron exempts vectors from weight decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, optimizer.learning_rate, optimizer.betas, optimizer.eps, optimizer.weight_decay)
