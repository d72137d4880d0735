"""How HF tensors map to a Megatron parameter sharded over tensor parallelism. Both directions are pure functions.

A layout converts the full HF tensors to one rank's shard, and all ranks' shards back to the full HF tensors. The second
is the exact inverse of the first, without arithmetic. With one rank the shard is the whole parameter, as stored in
distributed checkpoints written under any layout.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


class TensorLayout(ABC):
    """Mapping between HF tensors and a Megatron parameter."""

    @abstractmethod
    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """The Megatron shard of a tensor-parallel rank, from the full HF tensors in the order of the rule."""

    @abstractmethod
    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The full HF tensors, from the Megatron shards of all tensor-parallel ranks in rank order."""

    def cut(self, size: int) -> tuple[int, int] | None:
        """How the whole parameter is cut for `size` ranks: (dimension, number of equal consecutive pieces), the last
        pieces shorter if it does not divide evenly; None if every rank holds all of it."""
        return (0, size)


@dataclass(frozen=True)
class Replicated(TensorLayout):
    """The same tensor on every rank, such as norm weights."""

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return hf[0]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (shards[0],)

    def cut(self, size: int) -> None:
        return None


@dataclass(frozen=True)
class Split(TensorLayout):
    """Equal consecutive parts along a dimension, such as row-parallel weights along 1."""

    dim: int

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return hf[0].chunk(size, self.dim)[rank]

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (_join(shards, self.dim),)

    def cut(self, size: int) -> tuple[int, int]:
        return (self.dim, size)


@dataclass(frozen=True)
class GateAndUp(TensorLayout):
    """SwiGLU's two matrices: every shard holds its part of the gate, then its part of up."""

    def shard(self, hf: Sequence[Tensor], rank: int, size: int) -> Tensor:
        gate, up = hf
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])

    def merge(self, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards))
        return _join(gates), _join(ups)

    def cut(self, size: int) -> tuple[int, int]:
        return (0, 2 * size)  # each rank holds one piece of gate and one of up


@dataclass(frozen=True)
class GroupedQkv(TensorLayout):
    """Query, key and value interleaved by query group: a group's query heads, its key head, its value head.

    Ranks hold whole groups, so a rank's attention needs nothing from other ranks.
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
class Vocabulary(TensorLayout):
    """Rows of the vocabulary in equal consecutive parts, padded with zero rows to a multiple of the number of ranks.

    A zero row gives the logit 0, not minus infinity, so a softmax over the vocabulary must mask the padding.
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
    """Concatenate; does not copy a single shard."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)
