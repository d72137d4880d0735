"""A checkpoint of unknown origin is read without running code that it contains."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from torch.distributed import checkpoint
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_dsrl.weights.untrusted_checkpoint import ONLY_WEIGHTS, only_plain_objects, read_metadata

COMMON_STATE = ShardedObject("common_state", None, (1,), (0,)).unique_key


class RunsWhenRead:
    """A pickle of it creates a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def write_checkpoint(folder: Path, common_state: object) -> None:
    """A distributed checkpoint with one tensor and Megatron's entry for everything else."""
    state = {"decoder.weight": torch.arange(6.0).view(2, 3), COMMON_STATE: common_state}
    checkpoint.save(state, checkpoint_id=folder, planner=DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def test_an_honest_checkpoint_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [{"iteration": 3}])
    assert MegatronCheckpoint(tmp_path).shapes() == {"decoder.weight": (2, 3)}
    with only_plain_objects(tmp_path):
        assert load_common_state_dict(tmp_path)["iteration"] == 3
    assert ONLY_WEIGHTS not in os.environ


def test_a_hostile_metadata_file_is_refused(tmp_path: Path) -> None:
    folder, mark = tmp_path / "checkpoint", tmp_path / "mark"
    write_checkpoint(folder, [{}])
    (folder / ".metadata").write_bytes(pickle.dumps(RunsWhenRead(mark)))
    message = r"checkpoint/\.metadata cannot be read: refused, because it refers to posix\.mkdir"
    with pytest.raises(UserError, match=message):
        MegatronCheckpoint(folder)
    with pytest.raises(UserError, match=message), only_plain_objects(folder):
        load_common_state_dict(folder)
    assert not mark.exists()


def test_a_hostile_entry_is_refused(tmp_path: Path) -> None:
    folder, mark = tmp_path / "checkpoint", tmp_path / "mark"
    write_checkpoint(folder, [RunsWhenRead(mark)])
    message = r"checkpoint: refused, because an entry.*posix\.mkdir"
    with pytest.raises(UserError, match=message), only_plain_objects(folder):
        load_common_state_dict(folder)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"state_dict_metadata": {}}), b"\x80\x04N}b."])
def test_damaged_metadata_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata cannot be read: "):
        read_metadata(tmp_path)


def test_other_failures_keep_their_type(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [{}])
    with pytest.raises(KeyError), only_plain_objects(tmp_path):
        raise KeyError("something else")
