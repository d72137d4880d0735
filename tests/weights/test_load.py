"""Bad checkpoints are refused with the tensor and the file, before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.weights import safetensors_file
from megatron_dsrl.weights.checkpoint_shapes import check_hf_checkpoint
from megatron_dsrl.weights.hf_checkpoint import HfCheckpoint
from megatron_dsrl.weights.table import weight_table
from tests.support.tiny_model import make_tiny_qwen3

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def check(folder: Path) -> None:
    check_hf_checkpoint(HfCheckpoint(folder), weight_table(read_architecture(folder)))


def rewrite(folder: Path, change) -> None:
    """Apply a change to the tensors of the single weight file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny_qwen3(tmp_path, tied=False)
    check(tmp_path)
    return tmp_path


def test_missing_tensor(folder) -> None:
    rewrite(folder, lambda tensors: tensors.pop(QUERY))
    with pytest.raises(UserError, match=f"missing tensors: {QUERY}"):
        check(folder)


def test_surplus_tensor(folder) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(128)}))
    with pytest.raises(UserError, match=r"does not have: .*q_proj.bias \(in model.safetensors\)"):
        check(folder)


def test_wrong_shape(folder) -> None:
    rewrite(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY][:64].clone()}))
    with pytest.raises(UserError, match=rf"{QUERY} \(in model.safetensors\) is \[64, 64\].* asks for \[128, 64\]"):
        check(folder)


def test_vocabulary_other_than_in_the_config(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 130}))
    with pytest.raises(UserError, match=r"model.embed_tokens.weight .* is \[128, 64\], .* asks for \[130, 64\]"):
        check(folder)


def test_no_weights_at_all(folder) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights: neither .*index.json$"):
        check(folder)


def test_truncated_file(folder) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        check(folder)


def test_sharded_checkpoint_with_a_missing_file(tmp_path) -> None:
    make_tiny_qwen3(tmp_path, tied=True, max_shard_size="200KB")
    check(tmp_path)
    last = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(UserError, match=f"{last.name} is missing"):
        check(tmp_path)


def test_tied_checkpoint_may_hold_a_copy_of_the_head_but_no_other_head(tmp_path, monkeypatch) -> None:
    """Transformers uses a head that differs, even where the configuration ties it."""
    monkeypatch.setattr(safetensors_file, "PIECE_ELEMENTS", 1000)
    make_tiny_qwen3(tmp_path, tied=True)
    rewrite(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    check(tmp_path)

    rewrite(tmp_path, lambda tensors: tensors[HEAD][-1, -1].add_(1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with pytest.raises(UserError, match="lm_head.weight .* the same as .*Set tie_word_embeddings=false"):
        check(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING][:-1].clone()}))
    with pytest.raises(UserError, match="their values differ"):
        check(tmp_path)
