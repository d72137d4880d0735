"""How HF tensors lie in a Megatron parameter that is split over tensor parallelism: both directions, pure functions.

A layout turns the full HF tensors into one rank's shard, and all ranks' shards into the full HF tensors. The second
is the exact inverse of the first: no arithmetic, only moving.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Layout(ABC):
    """One way of placing HF tensors in a Megatron parameter."""

    @abstractmethod
    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """The Megatron shard of a tensor-parallel rank, from the full HF tensors of the rule in its order."""

    @abstractmethod
    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The full HF tensors, from the Megatron shards of all tensor-parallel ranks in rank order."""


@dataclass(frozen=True)
class Replicated(Layout):
    """The same tensor on every rank: norm weights."""

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return hf[0]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True)
class Split(Layout):
    """Equal consecutive parts along a dimension: row-parallel weights along 1."""

    dim: int

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return hf[0].chunk(size, self.dim)[rank]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards), self.dim),)


@dataclass(frozen=True)
class GateAndUp(Layout):
    """SwiGLU's two matrices: every shard holds its part of the gate, then its part of up."""

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        gate, up = hf
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards))
        return torch.cat(gates), torch.cat(ups)


@dataclass(frozen=True)
class GroupedQkv(Layout):
    """Query, key and value interleaved by query group: the query heads of a group, its key head, its value head.

    Groups are split over the ranks, so that a rank's attention needs nothing from another.
    """

    groups: int
    heads_per_group: int
    head_dim: int

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        by_group = [x.unflatten(0, (self.groups, -1)) for x in hf]  # [groups, heads * d, hidden]
        return torch.cat(by_group, 1).chunk(size)[rank].flatten(0, 1)

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        by_group = torch.cat(list(shards)).unflatten(0, (self.groups, -1))
        parts = by_group.split([self.heads_per_group * self.head_dim, self.head_dim, self.head_dim], 1)
        return tuple(part.flatten(0, 1) for part in parts)


@dataclass(frozen=True)
class Vocabulary(Layout):
    """Rows of the vocabulary, padded with zero rows to a multiple of the ranks, in equal consecutive parts.

    A zero row gives the logit 0, not minus infinity: whoever normalises over the vocabulary must mask the padding.
    """

    vocab_size: int

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        rows = -(-self.vocab_size // size)
        part = hf[0][rank * rows : (rank + 1) * rows]
        return torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (torch.cat(list(shards))[: self.vocab_size],)
