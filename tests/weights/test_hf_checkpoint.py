"""Which files of an HF folder hold its weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.weights.hf_checkpoint import INDEX_FILE, SINGLE_FILE, HfCheckpoint

NAME = "model.norm.weight"
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with one shard and its index."""
    save_file({NAME: torch.ones(2), BUFFER: torch.ones(4)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys((NAME, BUFFER), "model-00001-of-00001.safetensors")}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    return tmp_path


def test_computed_buffers_are_not_weights(sharded, tmp_path_factory) -> None:
    single = tmp_path_factory.mktemp("single")
    save_file({NAME: torch.ones(2), BUFFER: torch.ones(4)}, single / SINGLE_FILE)
    assert HfCheckpoint(sharded).names() == HfCheckpoint(single).names() == {NAME}


def test_a_single_file_beside_the_shards_of_another_save_is_refused(sharded) -> None:
    """Typical after `save_pretrained` into a folder with old shards: Transformers reads one set, SGLang the other."""
    save_file({NAME: torch.zeros(2)}, sharded / SINGLE_FILE)
    with pytest.raises(UserError, match=f"two sets of weights: {SINGLE_FILE}, and the files that {INDEX_FILE} names"):
        HfCheckpoint(sharded)


def test_an_index_may_name_the_single_file(sharded) -> None:
    save_file({NAME: torch.zeros(2)}, sharded / SINGLE_FILE)
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": {NAME: SINGLE_FILE}}))
    assert HfCheckpoint(sharded).read(NAME).tolist() == [0.0, 0.0]
