"""An objective: experience, the loss of its tokens, how tokens are weighed, and the factor of the whole.

A phase has one, or several whose losses are added up (each over its own denominator).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.losses import PolicyLoss, token_mean_weights

Aggregation = Callable[[Sequence[int]], Tensor]
"""Scored tokens of every sequence of an optimizer step -> [num_sequences] float32, the weight of its tokens."""


@dataclass(frozen=True)
class Objective:
    """One term of the loss of an optimizer step."""

    experience: Experience
    """With advantages."""
    loss: PolicyLoss
    coefficient: float = 1.0
    """Factor on the loss."""
    aggregation: Aggregation = token_mean_weights
    name: str = "policy"
    """First part of the names of its metrics."""
    needs_entropy_gradient: bool = False
    """The loss differentiates through the entropy."""

    def mini_batches(self, count: int) -> list["Objective"]:
        """The objective on each of `count` consecutive parts of its experience."""
        return [replace(self, experience=part) for part in self.experience.mini_batches(count)]
