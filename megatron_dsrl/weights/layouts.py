"""How HF tensors lie in a Megatron parameter that is split over tensor parallelism: both directions, pure functions.

A layout turns the full HF tensors into one rank's shard, and all ranks' shards into the full HF tensors. The second
is the exact inverse of the first: no arithmetic, only moving. The shard of the only rank of one is the whole
parameter, which is what distributed checkpoints hold, whatever the layout that wrote them.
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

    def cut(self, size: int) -> tuple[int, int] | None:
        """How the whole parameter is cut for `size` ranks: along which dimension into how many equal consecutive
        pieces, the last ones shorter where that does not divide; None if every rank holds all of it."""
        return (0, size)


@dataclass(frozen=True)
class Replicated(Layout):
    """The same tensor on every rank: norm weights."""

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return hf[0]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (shards[0],)

    def cut(self, size: int) -> None:
        return None


@dataclass(frozen=True)
class Split(Layout):
    """Equal consecutive parts along a dimension: row-parallel weights along 1."""

    dim: int

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return hf[0].chunk(size, self.dim)[rank]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (_join(shards, self.dim),)

    def cut(self, size: int) -> tuple[int, int]:
        return (self.dim, size)


@dataclass(frozen=True)
class GateAndUp(Layout):
    """SwiGLU's two matrices: every shard holds its part of the gate, then its part of up."""

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        gate, up = hf
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards))
        return _join(gates), _join(ups)

    def cut(self, size: int) -> tuple[int, int]:
        return (0, 2 * size)  # a rank holds one piece of the gate and one of up


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
        by_group = _join(shards).unflatten(0, (self.groups, -1))
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
        if len(part) == rows:
            return part
        return torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (_join(shards)[: self.vocab_size],)


def _join(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenation that copies nothing where there is nothing to join."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)
