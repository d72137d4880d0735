"""The hub's name and the license of the model that a run began with."""

from pathlib import Path

from megatron_dsrl.publishing.base_model import base_model_name, license_of
from megatron_dsrl.weights.checkpoint_record import CheckpointRecord


def test_the_base_model_is_found_behind_snapshots_and_conversions(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "hub" / "models--Qwen--Qwen3-8B" / "snapshots" / "b968826d"
    snapshot.mkdir(parents=True)
    for name, source in (("converted", "Qwen/Qwen3-8B"), ("of_snapshot", str(snapshot)), ("of_mine", "/gone/mine")):
        (tmp_path / name).mkdir()
        CheckpointRecord(architecture={}, dtype="bfloat16", layout={}, source=source).write(tmp_path / name)
    paths = ("Qwen/Qwen3-8B", str(snapshot), "converted", "of_snapshot")
    assert [base_model_name(path) for path in paths] == ["Qwen/Qwen3-8B"] * 4
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert [base_model_name(path) for path in ("models/mine", "of_mine", "models/gone")] == [None] * 3
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Qwen3\n")
    assert license_of(snapshot) == {"license": "apache-2.0"} and license_of(tmp_path) == {}
