"""A push replaces every element of every weight that the engine holds.

SGLang ignores names that it does not know. An engine that kept a part of older weights would sample from a policy that
the trainer never had, so every weight is overwritten with random numbers, and must be what it was after the next push.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dsrl.rollout.engine_rollout import EngineRollout
from tests.support import tiny_model
from tests.support.engine import started_rollout, tiny_run_config, weights_checker


def checksums(rollout: EngineRollout) -> dict[str, str]:
    """By SGLang's own names of the weights."""
    (engine,) = rollout.engine_addresses
    (rank,) = weights_checker(engine, "checksum")["ranks"]
    return rank["checksums"]


def different(one: dict[str, str], other: dict[str, str]) -> set[str]:
    assert one.keys() == other.keys() and len(one) > 10
    return {name for name in one if one[name] != other[name]}


def push(rollout: EngineRollout, named: list[tuple[str, torch.Tensor]]) -> dict[str, str]:
    rollout.load_weights(lambda: [named[:7], named[7:]], rollout.weight_version + 1)
    return checksums(rollout)


def assert_that_a_push_replaces_everything(rollout: EngineRollout, folder: Path) -> None:
    named = list(load_file(folder / "model.safetensors").items())
    pushed = push(rollout, named)
    weights_checker(rollout.engine_addresses[0], "reset_tensors")
    assert different(pushed, checksums(rollout)) == set(pushed), "the check can see every weight"
    assert different(pushed, push(rollout, named)) == set()

    weights_checker(rollout.engine_addresses[0], "reset_tensors")
    assert len(different(pushed, push(rollout, named[:-1]))) == 1, "the check sees a single missing tensor"
    push(rollout, named)


def test_a_push_replaces_every_weight(engine_rollout, tiny_model_folder) -> None:
    assert_that_a_push_replaces_everything(engine_rollout, tiny_model_folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        partial(tiny_model.make_tiny_qwen3, tied=False),
        tiny_model.make_tiny_qwen3_moe,
        tiny_model.make_tiny_qwen2,
        partial(tiny_model.make_tiny_llama, tied=False),
    ],
    ids=["untied Qwen3", "Qwen3-MoE", "Qwen2.5", "untied Llama"],
)
def test_a_push_replaces_every_weight_of_other_families(make, tmp_path) -> None:
    make(tmp_path / "model")
    with started_rollout(tiny_run_config(tmp_path / "model"), tmp_path) as rollout:
        assert_that_a_push_replaces_everything(rollout, tmp_path / "model")
