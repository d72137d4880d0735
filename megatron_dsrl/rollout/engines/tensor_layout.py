"""How SGLang 0.5.23 stores the supported models: how it fuses, splits and quantises HF tensors.

It fuses what one matrix product can compute: queries, keys and values; gate and up; all experts of a layer. Matrices
are split by output rows, those after a nonlinearity by input columns. A key-value head is replicated on several ranks
if there are more ranks than heads (on CPU, SGLang pads the heads in that case, which is not done here). The vocabulary
and, on CPU, the inner sizes of feed-forward layers are padded with zeros. Norms and the experts' router are on every
rank.

With `engine.quantization` the trainer quantises at the push. SGLang loads FP8 weights in blocks under the names of
DeepSeek-V3's checkpoints, `....weight` and `....weight_scale_inv`, into the parameters that it computes with. The
projections of every layer are quantised; norms, embedding, head and the experts' router stay as they are. SGLang's
digest of a quantised weight is that of the bfloat16 matrix that values and scales represent.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dsrl.config.engine_numerics import FP8_BLOCK
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.weights.fp8 import dequantise_blocks, quantise_blocks

VOCABULARY_MULTIPLE = 64
EXPERT = re.compile(r"(?P<layer>.*\.experts)\.(?P<expert>\d+)\.(?P<matrix>gate|up|down)_proj\.weight")
DENSE = re.compile(r"(?P<layer>.*\.)(?P<matrix>q|k|v|gate|up)_proj\.(?P<kind>weight|bias)")
ROW_GROUPS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
PROJECTION = re.compile(r"model\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj\.weight")
FP8_CHECKPOINT = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
"""`quantization_config` of such a checkpoint's config.json."""


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


def fp8_server_arguments() -> dict[str, str]:
    """SGLang server arguments with which an engine stores FP8 weights, though the model's folder has none."""
    return {"json_model_override_args": json.dumps({"quantization_config": FP8_CHECKPOINT})}


def is_quantised(name: str) -> bool:
    """Whether an engine stores the HF tensor of this name in FP8."""
    return PROJECTION.fullmatch(name) is not None


def quantised_buckets(buckets: Iterable[Bucket]) -> Iterator[Bucket]:
    """The same weights as the engine stores them, in buckets of one dtype each: values, scales, and the others."""
    for bucket in buckets:
        values: Bucket = []
        scales: Bucket = []
        for name, tensor in bucket:
            if is_quantised(name):
                value, scale = quantise_blocks(tensor.detach())
                values.append((name, value))
                scales.append((f"{name}_scale_inv", scale))
        others = [(name, tensor) for name, tensor in bucket if not is_quantised(name)]
        yield from filter(None, (values, scales, others))


def as_the_engine_compares(name: str, tensor: Tensor) -> Tensor:
    """What the engine digests for the HF tensor of this name: quantised and back, in bfloat16."""
    return dequantise_blocks(*quantise_blocks(tensor)) if is_quantised(name) else tensor
