"""A small /dev/shm is named before any engine starts."""

import shutil
from types import SimpleNamespace

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rollout.engines import shared_memory
from megatron_dsrl.rollout.engines.shared_memory import check_shared_memory
from tests.support.engine import tiny_run_config


def test_shared_memory_must_hold_a_bucket_of_every_rank(tiny_model_folder, monkeypatch) -> None:
    config = tiny_run_config(tiny_model_folder)
    size = sum(file.stat().st_size for file in tiny_model_folder.glob("*.safetensors"))  # float32, in one bucket

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * size))
    check_shared_memory(config, ranks=2)
    with pytest.raises(UserError, match="engine.weight_bucket_megabytes: .* for each of 4 process.*shm-size"):
        check_shared_memory(config, ranks=4)
    assert shared_memory.FOLDER.is_dir()
