"""Weights as an engine with `engine.quantization` stores them: the trainer quantises at the push.

SGLang 0.5.23 loads FP8 weights in blocks under the names of DeepSeek-V3's checkpoints, `....weight` and
`....weight_scale_inv`, into the parameters that it computes with. It quantises the projections of every layer; norms,
embedding, head and the experts' router stay as they are. Its digest of a quantised weight is that of the bfloat16
matrix that values and scales stand for.
"""

import json
import re
from collections.abc import Iterable, Iterator

from torch import Tensor

from megatron_dsrl.config.engine_numerics import FP8_BLOCK
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.weights.fp8 import dequantise_blocks, quantise_blocks

PROJECTION = re.compile(r"model\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj\.weight")
FP8_CHECKPOINT = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
"""`quantization_config` of such a checkpoint's config.json."""


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
