"""The update on CUDA devices: what a machine without one cannot run.

One GPU: local layers against Transformers, Transformer Engine's against local ones. Two GPUs: NCCL, and Transformer
Engine's own context parallelism for packed rows, against one GPU.
"""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.actor.offload import MODEL_PARTS
from megatron_dsrl.model.layer_spec import transformer_engine_is_usable
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.actor.test_actor import NSR_PRERL, objective_of, reference
from tests.actor.test_layouts import (
    INTERLEAVED,
    SEQUENCE_PARALLEL,
    Case,
    configuration,
    errors_of,
    run_cases,
    same_on_every_rank,
    weights_of,
)
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LOCAL = Case(layer_spec="local", max_tokens=10_000)
LOCAL_BFLOAT16 = Case(layer_spec="local", max_tokens=10_000, dtype="bfloat16")
ENGINE = Case(layer_spec="transformer_engine", max_tokens=10_000, dtype="bfloat16")
NCCL = {
    "TP 2 with sequence parallelism": SEQUENCE_PARALLEL,
    "PP 2 x 2 virtual stages": INTERLEAVED,
    "CP 2": {"context_parallel_size": 2},
    "DP 2, distributed optimizer": {"distributed_optimizer": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Qwen3ForCausalLM]:
    folder = tmp_path_factory.mktemp("models")
    return folder, make_tiny_qwen3(folder / "dense", tied=True, vocab_size=127)


@pytest.fixture(scope="module")
def one_gpu(model) -> dict[str, dict]:
    cases = {"local": LOCAL, "local, bfloat16": LOCAL_BFLOAT16}
    if transformer_engine_is_usable():
        cases["Transformer Engine"] = ENGINE
    return run_distributed(run_cases, 1, model[0], cases, timeout_seconds=280)[0]


def test_local_layers_equal_transformers(model, one_gpu) -> None:
    """The first update, in float32; Transformers computes on the CPU. CUDA adds up in another order."""
    loss, grad_norm = reference(model[1], NSR_PRERL)
    update = one_gpu["local"]["updates"][0]
    assert update["loss"] == pytest.approx(loss, rel=1e-4)
    assert update["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)


def offload_once(folder: Path) -> dict[str, int | bool]:
    """After an update: what the round trip freed and changed."""
    config = configuration(LOCAL_BFLOAT16, folder)
    with parallel_layout(config.parallel, seed=1):
        actor = build_actor(config, folder / "dense")
        actor.update([objective_of(NSR_PRERL)])
        before, weights = torch.cuda.memory_allocated(), weights_of(actor)
        moved = actor.model.memory.offload(MODEL_PARTS)
        freed = before - torch.cuda.memory_allocated()
        back = actor.model.memory.onload(MODEL_PARTS)
        same = all((weight == weights[name]).all() for name, weight in weights_of(actor).items())
        actor.update([objective_of(NSR_PRERL)])
    destroy_parallel()
    return {"moved": moved, "freed": freed, "back": back, "same": bool(same)}


def test_offloading_frees_device_memory_and_changes_nothing(model, one_gpu) -> None:
    (result,) = run_distributed(offload_once, 1, model[0])
    assert result["same"] and result["back"] == result["moved"]
    assert result["freed"] >= result["moved"] >= 18 * 205_568  # 4 bytes of gradients, 12 of optimizer, 2


@pytest.mark.skipif(not transformer_engine_is_usable(), reason="needs Transformer Engine")
def test_transformer_engine_stays_close_to_local_layers(one_gpu) -> None:
    """Both in bfloat16, within 2 %: fused kernels round at other places."""
    ours, theirs = one_gpu["local, bfloat16"], one_gpu["Transformer Engine"]
    for one, other in zip(ours["updates"][:2], theirs["updates"][:2]):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_equal_one(model, one_gpu) -> None:
    """Local layers in float32, over NCCL."""
    cases = {name: Case(layer_spec="local", parallel=parallel) for name, parallel in NCCL.items()}
    results = same_on_every_rank(run_distributed(run_cases, 2, model[0], cases, timeout_seconds=280))
    for name, result in results.items():
        errors = errors_of(result, one_gpu["local"])
        assert max(errors.loss, errors.grad_norm, errors.metrics, errors.parameters) < 1e-4, (name, errors)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not transformer_engine_is_usable(),
    reason="needs two CUDA devices and Transformer Engine",
)
def test_transformer_engine_splits_packed_sequences_as_we_do(model, one_gpu) -> None:
    """Its context parallelism takes our packing: bfloat16, within 2 % of one GPU."""
    case = Case(layer_spec="transformer_engine", dtype="bfloat16", parallel={"context_parallel_size": 2})
    results = same_on_every_rank(run_distributed(run_cases, 2, model[0], {"CP 2": case}, timeout_seconds=280))
    for one, other in zip(one_gpu["Transformer Engine"]["updates"][:2], results["CP 2"]["updates"][:2]):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.02)
