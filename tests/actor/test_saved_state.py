"""An actor that stops, saves and continues is the actor that never stopped: bit for bit in the same layout, and within
rounding in another one."""

from pathlib import Path

import numpy as np
import pytest

from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.config.actor import ActorConfig
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.run import CheckpointConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.actor.test_actor import GRPO, NSR_PRERL, objective_of, run_config
from tests.support.actors import flat, weights_of
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3, make_tiny_qwen3_moe

ACTOR = ActorConfig(max_tokens_per_micro_batch=100)
LAYOUTS = {
    "tensor parallel": ParallelConfig(tensor_parallel_size=2),
    "pipeline parallel": ParallelConfig(pipeline_parallel_size=2),
    "data parallel": ParallelConfig(),
    "distributed optimizer": ParallelConfig(distributed_optimizer=True),
    "virtual stages": ParallelConfig(pipeline_parallel_size=2, virtual_pipeline_stages=2),
    "context parallel, distributed optimizer": ParallelConfig(context_parallel_size=2, distributed_optimizer=True),
    "distributed optimizer, gathered on the host": ParallelConfig(distributed_optimizer=True),
    "experts": ParallelConfig(expert_parallel_size=2),
    "experts, distributed optimizer": ParallelConfig(expert_parallel_size=2, distributed_optimizer=True),
}

ALONE = {
    name: ParallelConfig(distributed_optimizer=parallel.distributed_optimizer)
    for name, parallel in LAYOUTS.items()
    if parallel.expert_parallel_size == 1  # else the optimizer is two, which Megatron stores in another form
}
STILL_TWO = {
    name: ParallelConfig(
        tensor_parallel_size=2,
        sequence_parallel=True,
        expert_parallel_size=2,
        expert_tensor_parallel_size=1,
        distributed_optimizer=LAYOUTS[name].distributed_optimizer,
    )
    for name in LAYOUTS
    if name not in ALONE
}


def model_of(layout: str, models: Path) -> Path:
    return models / ("experts" if layout.startswith("experts") else "dense")


def take_steps(actor, phases) -> list[dict]:
    return [flat(actor.update([objective_of(phase)])) for phase in phases]


def without_and_with_a_stop(folder: Path, layouts: dict[str, ParallelConfig]) -> dict[str, dict]:
    """Two steps, save, two steps; and again from the checkpoint, in each of these layouts. It is written only after the
    last step: what it holds must be a copy."""
    results: dict[str, dict] = {}
    for name, parallel in layouts.items():
        target, model = folder / name, model_of(name, folder)
        target.mkdir(exist_ok=True)
        with parallel_layout(parallel, seed=1):
            checkpoint = CheckpointConfig(gather_optimizer_on="host" if name.endswith("host") else "device")
            config = run_config(model, parallel, ACTOR).model_copy(update={"checkpoint": checkpoint})
            actor = build_actor(config, model)
            take_steps(actor, [NSR_PRERL, NSR_PRERL])
            save = actor.model.start_save(target, copy=True)
            steps = take_steps(actor, [GRPO, GRPO])
            save.write()
            save.finish()
            results[name] = {"steps": steps, "weights": weights_of(actor)}
        with parallel_layout(parallel, seed=2):
            actor = build_actor(run_config(model, parallel, ACTOR), model)
            actor.model.load(target, same_layout=True)
            steps = take_steps(actor, [GRPO, GRPO])
            results[name] |= {"resumed steps": steps, "resumed weights": weights_of(actor)}
    destroy_parallel()
    return results


def continue_in_another_layout(folder: Path, layouts: dict[str, ParallelConfig]) -> dict[str, dict]:
    """From the checkpoint of every layout named, in the layout given for it."""
    results = {}
    for name, parallel in layouts.items():
        model = model_of(name, folder)
        with parallel_layout(parallel, seed=3):
            actor = build_actor(run_config(model, parallel, ACTOR), model)
            actor.model.load(folder / name, same_layout=False)
            results[name] = {"steps": take_steps(actor, [GRPO, GRPO]), "weights": weights_of(actor)}
    destroy_parallel()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    make_tiny_qwen3(folder / "dense", tied=True, vocab_size=127)
    make_tiny_qwen3_moe(folder / "experts", vocab_size=127)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
    return run_distributed(without_and_with_a_stop, 2, folder, LAYOUTS, timeout_seconds=240)[0]


@pytest.fixture(scope="module")
def continued(folder, results) -> dict[str, dict]:
    """Two processes wrote it; one continues, or two in another layout."""
    (alone,) = run_distributed(continue_in_another_layout, 1, folder, ALONE, timeout_seconds=240)
    return alone | run_distributed(continue_in_another_layout, 2, folder, STILL_TWO, timeout_seconds=240)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(results, layout) -> None:
    result = results[layout]
    assert result["resumed steps"] == result["steps"]
    for name, weight in result["weights"].items():
        assert np.array_equal(result["resumed weights"][name], weight), name


@pytest.mark.parametrize("source", LAYOUTS)
def test_another_layout_continues_within_rounding(results, continued, source) -> None:
    for one, other in zip(results[source]["steps"], continued[source]["steps"], strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-9)
    for name, weight in results[source]["weights"].items():
        np.testing.assert_allclose(continued[source]["weights"][name], weight, rtol=0, atol=2.5e-7, err_msg=name)
