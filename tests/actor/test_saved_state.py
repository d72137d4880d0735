"""An actor that stops, saves and continues is the actor that never stopped: bit for bit in the same layout, and within
rounding in another one."""

from pathlib import Path

import numpy as np
import pytest

from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.config.actor import ActorConfig
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.actor.test_actor import GRPO, NSR_PRERL, objective_of, run_config
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3

ACTOR = ActorConfig(max_tokens_per_micro_batch=100)
LAYOUTS = {
    "tensor parallel": ParallelConfig(tensor_parallel_size=2),
    "pipeline parallel": ParallelConfig(pipeline_parallel_size=2),
    "data parallel": ParallelConfig(),
    "distributed optimizer": ParallelConfig(distributed_optimizer=True),
}


def take_steps(actor, phases) -> list[dict]:
    return [actor.update([objective_of(phase)]).flat() for phase in phases]


def weights_of(actor) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for bucket in actor.hf_weights(bucket_bytes=10**6) for name, tensor in bucket}


def without_and_with_a_stop(model: Path, folder: Path) -> dict[str, dict]:
    """Two steps, save, two steps; and again from the checkpoint, in every layout. It is written only after the last
    step: what it holds must be a copy of its own."""
    results: dict[str, dict] = {}
    for name, parallel in LAYOUTS.items():
        target = folder / name
        target.mkdir(exist_ok=True)
        with parallel_layout(parallel, seed=1):
            actor = build_actor(run_config(model, parallel, ACTOR), model)
            take_steps(actor, [NSR_PRERL, NSR_PRERL])
            save = actor.begin_save(target, copy=True)
            steps = take_steps(actor, [GRPO, GRPO])
            save.write()
            save.finish()
            results[name] = {"steps": steps, "weights": weights_of(actor)}
        with parallel_layout(parallel, seed=2):
            actor = build_actor(run_config(model, parallel, ACTOR), model)
            actor.load(target, same_layout=True)
            steps = take_steps(actor, [GRPO, GRPO])
            results[name] |= {"resumed steps": steps, "resumed weights": weights_of(actor)}
    destroy_parallel()
    return results


def continue_in_another_layout(model: Path, source: Path, parallel: ParallelConfig) -> dict:
    with parallel_layout(parallel, seed=3):
        actor = build_actor(run_config(model, parallel, ACTOR), model)
        actor.load(source, same_layout=False)
        result = {"steps": take_steps(actor, [GRPO, GRPO]), "weights": weights_of(actor)}
    destroy_parallel()
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    make_tiny_qwen3(folder / "model", tied=True, vocab_size=127)
    return folder / "model"


@pytest.fixture(scope="module")
def results(model, folder) -> dict[str, dict]:
    return run_distributed(without_and_with_a_stop, 2, model, folder, timeout_seconds=240)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(results, layout):
    result = results[layout]
    assert result["resumed steps"] == result["steps"]
    for name, weight in result["weights"].items():
        assert np.array_equal(result["resumed weights"][name], weight), name


@pytest.mark.parametrize("source", LAYOUTS)
def test_another_layout_continues_within_rounding(results, model, folder, source):
    """Two processes wrote it, one continues."""
    alone = ParallelConfig(distributed_optimizer=LAYOUTS[source].distributed_optimizer)
    (continued,) = run_distributed(continue_in_another_layout, 1, model, folder / source, alone)
    for one, other in zip(results[source]["steps"], continued["steps"], strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-9)
    for name, weight in results[source]["weights"].items():
        np.testing.assert_allclose(continued["weights"][name], weight, rtol=0, atol=2.5e-7, err_msg=name)
