"""Experts sharded over two real gloo processes: logits and gradients are those of Transformers, weights come out whole.

The same measurements as in test_sharded_model.py, for the layouts that only experts have.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.build import build_model, build_trainable
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.weights.load import load_hf_weights
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import weight_table
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3_moe
from tests.weights.test_sharded_model import MICRO_BATCHES, backward, gradient_errors, logits_error, rows
from tests.weights.test_sharded_model import VOCAB_SIZE as COMPARED

VOCAB_SIZE = 102  # even, so that no padding takes part in the cross-entropy; rows() has no token above 100
LAYOUTS = {
    "EP2": {"expert_parallel_size": 2},
    "TP2+SP": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "TP2+SP, EP2+ETP1": {
        "tensor_parallel_size": 2,
        "sequence_parallel": True,
        "expert_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "PP2": {"pipeline_parallel_size": 2},
}


def reference(model: nn.Module) -> dict:
    """Logits of every micro-batch, and gradients of the mean cross-entropy of every token predicting itself."""
    logits = [
        torch.cat([model(sequence).logits[0] for sequence in row.split(lengths, 1)])
        for row, lengths in zip(rows(), MICRO_BATCHES)
    ]
    losses = [F.cross_entropy(x, row[0], reduction="none") for x, row in zip(logits, rows())]
    torch.cat(losses).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": [x.detach()[:, :COMPARED] for x in logits], "gradients": per_expert(gradients)}


def per_expert(fused: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' fused experts under the names of the hub's files."""
    tensors = {}
    for name, tensor in fused.items():
        prefix, _, kind = name.partition("experts.")
        for expert, part in enumerate(tensor) if kind else ():
            halves = dict(zip(("gate_proj", "up_proj"), part.chunk(2))) if kind == "gate_up_proj" else {kind: part}
            tensors |= {f"{prefix}experts.{expert}.{half}.weight": value for half, value in halves.items()}
        if not kind:
            tensors[name] = tensor
    return tensors


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[dict]:
    """Results of both processes by layout."""
    folder = tmp_path_factory.mktemp("experts")
    torch.save(reference(make_tiny_qwen3_moe(folder, vocab_size=VOCAB_SIZE)), folder / "expected.pt")
    return run_distributed(measure_all_layouts, 2, folder, timeout_seconds=150)


def measure_all_layouts(folder: Path) -> dict[str, dict]:
    expected, source = torch.load(folder / "expected.pt"), load_file(folder / "model.safetensors")
    architecture = read_architecture(folder)
    table = weight_table(architecture)
    results = {}
    for layout, sizes in LAYOUTS.items():
        parallel = ParallelConfig(collective_timeout_seconds=60, **sizes)
        with parallel_layout(parallel, seed=1):
            chunks = build_model(architecture, ModelConfig(path=str(folder), dtype="float32"), parallel)
            load_hf_weights(chunks, table, folder)
            buckets = stream_hf_weights(chunks, table, 40_000, torch.float32)
            streamed = dict(pair for bucket in buckets for pair in bucket)
            results[layout] = {
                "round_trip_exact": streamed.keys() == source.keys()
                and all(torch.equal(streamed[name], source[name]) for name in source),
                "order": list(streamed),
                "logits_error": logits_error(chunks, expected["logits"]),
            }
            chunks = build_trainable(chunks, parallel)
            backward(chunks)
            results[layout]["gradient_errors"] = gradient_errors(chunks, table, expected["gradients"])
    destroy_parallel()
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(measured, layout) -> None:
    errors = [rank[layout]["logits_error"] for rank in measured if rank[layout]["logits_error"] is not None]
    assert errors and max(errors) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_transformers(measured, layout) -> None:
    """Including the router: the weights of the experts carry its gradient."""
    for rank in measured:
        errors = rank[layout]["gradient_errors"]
        assert len(errors) == 87
        assert max(errors.values()) <= 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_out_bit_identical_in_the_same_order_on_every_rank(measured, layout) -> None:
    first, second = (rank[layout] for rank in measured)
    assert first["round_trip_exact"] and second["round_trip_exact"]
    assert first["order"] == second["order"] == measured[0]["PP2"]["order"]
