"""The weight push on a GPU: CUDA IPC into a real engine on the same device, compared by SGLang's own kernel."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from tests.support.engine import started_rollout, tiny_run_config, weights_checker
from tests.support.tiny_model import make_tiny_qwen3

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "model"
    make_tiny_qwen3(folder, tied=False, vocab_size=101, dtype=torch.bfloat16, head_dim=128)
    return folder


@pytest.fixture(scope="module")
def named(folder) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.cuda()) for name, tensor in load_file(folder / "model.safetensors").items()]


@pytest.fixture(scope="module")
def rollout(folder, tmp_path_factory) -> Iterator[EngineRollout]:
    config = tiny_run_config(
        folder,
        check_weights="always",
        memory_fraction=0.2,
        startup_timeout_seconds=600.0,  # the platform's defaults: fused attention, and CUDA graphs are captured
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    with started_rollout(config, tmp_path_factory.mktemp("run")) as rollout:
        yield rollout


def test_weights_arrive_bit_for_bit_though_every_bucket_is_overwritten(rollout, named) -> None:
    def buckets() -> Iterator[Bucket]:
        for start in range(0, len(named), 5):
            bucket = [(name, tensor.clone()) for name, tensor in named[start : start + 5]]
            yield bucket
            for _, tensor in bucket:
                tensor.zero_()

    for version in (1, 2):
        weights_checker(rollout.engine_addresses[0], "reset_tensors")
        rollout.load_weights(buckets, version)


def test_after_sleep_and_wake_they_arrive_again(rollout, named) -> None:
    rollout.release_memory()
    rollout.resume_weights()
    rollout.load_weights(lambda: [named[:9], named[9:]], 3)
    rollout.resume_kv_cache()


def test_a_missing_tensor_is_found(rollout, named) -> None:
    weights_checker(rollout.engine_addresses[0], "reset_tensors")
    with pytest.raises(UserError, match="does not hold the weights that the trainer sent"):
        rollout.load_weights(lambda: [named[:-1]], 4)
