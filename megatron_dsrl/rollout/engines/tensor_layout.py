"""How SGLang 0.5.23 stores the supported models: which HF tensors it fuses, and how it splits them over its ranks.

It fuses what one matrix product can compute: queries, keys and values; gate and up; all experts of a layer. Matrices
are split by output rows, those after a nonlinearity by input columns. A key-value head is replicated on several ranks
if there are more ranks than heads (on CPU, SGLang pads the heads in that case, which is not done here). The vocabulary
and, on CPU, the inner sizes of feed-forward layers are padded with zeros. Norms and the experts' router are on every
rank.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dsrl.model.architecture import Architecture

VOCABULARY_MULTIPLE = 64
EXPERT = re.compile(r"(?P<layer>.*\.experts)\.(?P<expert>\d+)\.(?P<matrix>gate|up|down)_proj\.weight")
DENSE = re.compile(r"(?P<layer>.*\.)(?P<matrix>q|k|v|gate|up)_proj\.(?P<kind>weight|bias)")
ROW_GROUPS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True)
class Place:
    """Where an HF tensor is stored in an engine parameter."""

    parameter: str
    """SGLang's name of the parameter."""
    part: int = 0
    """Index among the tensors that are concatenated in it along the first dimension."""
    parts: int = 1
    """Number of these tensors."""


@dataclass(frozen=True)
class EngineLayout:
    """The layout on one rank of an engine."""

    architecture: Architecture
    rank: int
    """Tensor-parallel rank within the engine."""
    size: int
    """The engine's tensor-parallel size."""
    feed_forward_multiple: int = 1
    """Inner sizes of feed-forward layers and experts are padded to a multiple of this on every rank; see
    `platform.engine.feed_forward_multiple`."""

    def place(self, name: str) -> Place:
        """Where the HF tensor of this name is stored in the engine; the same on every rank."""
        if match := EXPERT.fullmatch(name):
            assert self.architecture.experts is not None
            expert, experts = int(match["expert"]), self.architecture.experts.num_experts
            if match["matrix"] == "down":
                return Place(f"{match['layer']}.w2_weight", expert, experts)
            return Place(f"{match['layer']}.w13_weight", 2 * expert + (match["matrix"] == "up"), 2 * experts)
        if match := DENSE.fullmatch(name):
            for fused, group in ROW_GROUPS.items():
                if match["matrix"] in group:
                    parameter = f"{match['layer']}{fused}_proj.{match['kind']}"
                    return Place(parameter, group.index(match["matrix"]), len(group))
        return Place(name)

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's shard of an HF tensor."""
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return self._vocabulary_shard(tensor)
        matrix = name.rsplit(".", 2)[-2]
        if matrix in ("gate_proj", "up_proj"):
            return self._pad_feed_forward(tensor, dim=0).chunk(self.size, dim=0)[self.rank]
        if matrix == "q_proj":
            return tensor.chunk(self.size, dim=0)[self.rank]
        if matrix in ("k_proj", "v_proj"):
            heads = tensor.chunk(min(self.size, self.architecture.num_key_value_heads), dim=0)
            return heads[self.rank * len(heads) // self.size]
        if matrix == "down_proj":
            return self._pad_feed_forward(tensor, dim=1).chunk(self.size, dim=1)[self.rank]
        if matrix == "o_proj":
            return tensor.chunk(self.size, dim=1)[self.rank]
        return tensor

    def _pad_feed_forward(self, tensor: Tensor, dim: int) -> Tensor:
        missing = _padded(tensor.shape[dim], self.size * self.feed_forward_multiple) - tensor.shape[dim]
        return torch.nn.functional.pad(tensor, (0, 0, 0, missing) if dim == 0 else (0, missing))

    def _vocabulary_shard(self, tensor: Tensor) -> Tensor:
        multiple = VOCABULARY_MULTIPLE
        if _padded(len(tensor), multiple) % self.size:
            multiple *= self.size
        rows = _padded(len(tensor), multiple) // self.size
        mine = tensor[self.rank * rows : (self.rank + 1) * rows]
        return torch.nn.functional.pad(mine, (0, 0, 0, rows - len(mine)))


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
