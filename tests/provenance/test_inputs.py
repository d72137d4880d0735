"""Hashes of what a run reads: the same for the same content, and bounded by what they cost."""

import hashlib
import json
from pathlib import Path

from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.provenance import inputs
from megatron_dsrl.provenance.inputs import describe_model, describe_prompts, hash_files


def prompts(*answers: str) -> list[Prompt]:
    return [Prompt(index=i, text=f"problem {i}", token_ids=(i,), answer=answer) for i, answer in enumerate(answers)]


def test_small_files_are_hashed_first_and_large_ones_named(tmp_path: Path) -> None:
    for name, size in (("large.bin", 1000), ("small.json", 10), ("medium.json", 100)):
        (tmp_path / name).write_bytes(b"x" * size)
    found = hash_files(list(tmp_path.iterdir()), bytes_read=200)
    assert found == {
        "large.bin": {"bytes": 1000, "sha256": None},
        "medium.json": {"bytes": 100, "sha256": hashlib.sha256(b"x" * 100).hexdigest()},
        "small.json": {"bytes": 10, "sha256": hashlib.sha256(b"x" * 10).hexdigest()},
    }


def test_a_large_model_is_identified_by_its_fingerprint_and_a_hub_snapshot_by_its_commit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(inputs, "MODEL_BYTES_READ", 100)
    folder = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "b968826d"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    weights = bytearray(10**6)
    (folder / "model.safetensors").write_bytes(weights)
    before = describe_model("Qwen/Qwen3-8B", folder)
    assert (before["path"], before["hub_commit"]) == ("Qwen/Qwen3-8B", "b968826d")
    assert before["files"]["config.json"]["sha256"] == hashlib.sha256(b"{}").hexdigest()
    assert before["files"]["model.safetensors"] == {"bytes": 10**6, "sha256": None}
    weights[-1] = 1
    (folder / "model.safetensors").write_bytes(weights)
    assert describe_model("Qwen/Qwen3-8B", folder)["fingerprint"] != before["fingerprint"]


def test_a_prompt_set_is_identified_by_its_files_and_by_the_prompts_that_were_used(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"part{part}.jsonl").write_text(json.dumps({"problem": "1+1", "answer": "2"}) + "\n")
    config = PromptSetConfig(source=f"{tmp_path}/part*.jsonl")
    local = describe_prompts(config, prompts("2", "3"))
    assert list(local["files"]) == ["part1.jsonl", "part2.jsonl"] and (local["subset"], local["split"]) == (None, None)
    hub = describe_prompts(PromptSetConfig(source="openai/gsm8k", subset="main"), prompts("2", "3"))
    assert hub["files"] == {} and (hub["subset"], hub["split"], hub["prompts"]) == ("main", "train", 2)
    assert hub["prompts_sha256"] == local["prompts_sha256"], "the same prompts, wherever they come from"
    assert describe_prompts(config, prompts("2", "4"))["prompts_sha256"] != local["prompts_sha256"]
