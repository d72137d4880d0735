"""Weights as an FP8 engine stores them. No such engine runs on a CPU: test_sglang_contract.py reads what it does."""

import json

import pytest
import torch

from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.platform.weight_digest import weight_digest
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.engines.tensor_layout import (
    EngineLayout,
    as_the_engine_compares,
    fp8_server_arguments,
    is_quantised,
    quantised_buckets,
)
from megatron_dsrl.rollout.engines.weight_check import SentWeights
from megatron_dsrl.weights.fp8 import dequantise_blocks
from tests.support.tiny_model import make_tiny_qwen3

LAYER = "model.layers.0"


def bucket() -> Bucket:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"{LAYER}.self_attn.q_proj.weight": (128, 64), f"{LAYER}.self_attn.k_proj.weight": (128, 64),
        f"{LAYER}.self_attn.v_proj.weight": (128, 64), f"{LAYER}.self_attn.q_norm.weight": (32,),
        f"{LAYER}.mlp.down_proj.weight": (64, 256), "model.norm.weight": (64,),
    }  # fmt: skip
    return [(name, torch.randn(shape, generator=generator).to(torch.bfloat16)) for name, shape in shapes.items()]


@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        (f"{LAYER}.self_attn.o_proj.weight", True),
        (f"{LAYER}.mlp.gate_proj.weight", True),
        (f"{LAYER}.mlp.experts.17.down_proj.weight", True),
        (f"{LAYER}.mlp.gate.weight", False),  # the router
        (f"{LAYER}.self_attn.q_proj.bias", False),
        (f"{LAYER}.self_attn.q_norm.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_projections_are_quantised(name: str, quantised: bool) -> None:
    assert is_quantised(name) == quantised


def test_a_bucket_becomes_one_of_each_dtype() -> None:
    values, scales, others = quantised_buckets([bucket()])
    assert {tensor.dtype for _, tensor in values} == {torch.float8_e4m3fn}
    assert [name for name, _ in scales] == [f"{name}_scale_inv" for name, _ in values]
    assert [name for name, _ in others] == [f"{LAYER}.self_attn.q_norm.weight", "model.norm.weight"]
    assert [len(each) for each in quantised_buckets([others, values[:0]])] == [2], "none is empty"


def test_the_engines_digest_is_of_what_its_values_and_scales_represent(tmp_path) -> None:
    """SGLang stores queries, keys and values below each other, and digests the product in bfloat16."""
    make_tiny_qwen3(tmp_path, tied=True)
    sent = SentWeights(EngineLayout(read_architecture(tmp_path), rank=0, size=1), quantised=True)
    values, scales, others = quantised_buckets(sent.watch([bucket()]))
    stored = {name: dequantise_blocks(value, scale) for (name, value), (_, scale) in zip(values, scales, strict=True)}
    fused = torch.cat([stored.pop(f"{LAYER}.self_attn.{matrix}_proj.weight") for matrix in "qkv"])
    engine = {f"{LAYER}.self_attn.qkv_proj.weight": fused, **stored, **dict(others)}
    assert sent.differences({name: weight_digest(tensor) for name, tensor in engine.items()}) == []
    engine[f"{LAYER}.mlp.down_proj.weight"] = dict(bucket())[f"{LAYER}.mlp.down_proj.weight"]
    (difference,) = sent.differences({name: weight_digest(tensor) for name, tensor in engine.items()})
    assert difference == f"{LAYER}.mlp.down_proj.weight differs"
    norm = torch.ones(3)
    assert as_the_engine_compares("model.norm.weight", norm) is norm


def test_the_engine_is_told_the_form_by_its_configuration() -> None:
    override = json.loads(fp8_server_arguments()["json_model_override_args"])
    assert override["quantization_config"]["weight_block_size"] == [128, 128]
