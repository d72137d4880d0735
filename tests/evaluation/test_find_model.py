"""Which weights a name means: a run's newest policy, its exports and checkpoints, and what is not a model."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from megatron_dsrl.checkpoint.state import ProcessLayout, RunState, SavedState
from megatron_dsrl.cli import main
from megatron_dsrl.common.checksum import checksums, fingerprint
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.conversion.convert import ConversionOptions, convert_hf_to_megatron
from megatron_dsrl.conversion.distributed_checkpoint_writer import CheckpointLayout
from megatron_dsrl.evaluation.evaluate import default_output
from megatron_dsrl.evaluation.find_model import find_checkpoint, find_model
from megatron_dsrl.model.architecture import read_architecture
from tests.observability.synthetic_run import CONFIG
from tests.support.tiny_model import make_tiny_qwen3

PLAIN = ConversionOptions(dtype=None, verify=False, overwrite=False, expect=None)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with an export after step 2 and a checkpoint after step 3; models differ by their seeds."""
    model, run = tmp_path / "model", tmp_path / "runs" / "tiny"
    make_tiny_qwen3(model, tied=True)
    make_tiny_qwen3(run / "hf" / "step_000002", tied=True, seed=2)
    make_tiny_qwen3(tmp_path / "trained", tied=True, seed=3)
    checkpoint = run / "checkpoints" / "step_000003"
    checkpoint.mkdir(parents=True)
    convert_hf_to_megatron(str(tmp_path / "trained"), checkpoint / "megatron", CheckpointLayout(), PLAIN)
    for name in ("config.json", "generation_config.json", "megatron_dsrl.json"):  # a training does not write them
        (checkpoint / "megatron" / name).unlink(missing_ok=True)
    config = {"model": {"path": str(model)}}
    state = RunState(3, "GRPO", {}, ProcessLayout(1, 1, 1, False), asdict(read_architecture(model)), config)
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    SavedState(state, checksums(checkpoint, files)).write(checkpoint / "state.json")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_a_runs_folder_means_its_newest_policy(run, tmp_path) -> None:
    checkpoint = run / "checkpoints" / "step_000003"
    newest = find_model(str(run))
    assert (newest.folder, newest.companions) == (checkpoint / "megatron", tmp_path / "model")
    assert (newest.run_folder, newest.step, newest.is_megatron) == (run, 3, True)
    assert find_model(str(checkpoint)) == find_model(str(checkpoint / "megatron")) == newest
    assert default_output(newest) == run / "evaluation" / "step_000003"

    make_tiny_qwen3(run / "hf" / "step_000003", tied=True, seed=3)  # needs no conversion
    assert find_model(str(run)).folder == run / "hf" / "step_000003"


def test_a_checkpoint_is_not_pushed(run, capsys) -> None:
    assert main(["push", str(run), "me/tiny", "--dry-run"]) == 2
    assert "is a Megatron checkpoint, and the hub's libraries load HF folders" in capsys.readouterr().err


def test_a_checkpoint_of_adapters_is_not_a_model(run) -> None:
    state = run / "checkpoints" / "step_000003" / "state.json"
    saved = SavedState.read(state)
    saved.run.config["actor"] = {"lora": {"rank": 8}}
    saved.write(state)
    with pytest.raises(UserError, match="holds LoRA adapters only; name an exported policy"):
        find_model(str(run))


def test_an_export_belongs_to_its_run_and_other_models_to_none(run, tmp_path) -> None:
    export = find_model(str(run / "hf" / "step_000002"))
    assert (export.run_folder, export.step, export.is_megatron) == (run, 2, False)
    model = find_model(str(tmp_path / "model"))
    assert (model.run_folder, model.step) == (None, None)
    assert default_output(model) == Path("evaluations") / "model"
    assert fingerprint(export.folder) != fingerprint(model.folder)


def test_a_model_in_the_hubs_cache_has_its_hub_name(tmp_path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-4B" / "snapshots" / "1cfa9a72"
    make_tiny_qwen3(snapshot, tied=True)
    model = find_model(str(snapshot))
    assert model.name == "Qwen/Qwen3-4B"
    assert default_output(model) == Path("evaluations") / "Qwen3-4B"


def test_a_policy_may_be_the_current_folder_or_a_link(run, tmp_path, monkeypatch) -> None:
    for policy, step in (("hf/step_000002", 2), ("checkpoints/step_000003", 3)):
        monkeypatch.chdir(run / policy)
        assert default_output(find_model(".")) == run / "evaluation" / f"step_{step:06d}"
        link = tmp_path / f"link {step}"
        link.symlink_to(run / policy)
        assert default_output(find_model(str(link))) == run / "evaluation" / f"step_{step:06d}"
    monkeypatch.chdir(tmp_path / "model")
    assert default_output(find_model(".")) == Path("evaluations") / "model"


def test_a_copy_of_an_export_or_checkpoint_is_not_one_of_the_runs(run) -> None:
    shutil.copytree(run / "hf" / "step_000002", run / "hf" / "step_000009_copy")
    shutil.copytree(run / "checkpoints" / "step_000003", run / "checkpoints" / "step_000009_copy")
    assert find_model(str(run)).step == 3
    copy = find_model(str(run / "hf" / "step_000009_copy"))
    assert (copy.run_folder, copy.step) == (None, None)


def test_an_export_stands_in_for_a_model_that_has_moved(run, tmp_path) -> None:
    (tmp_path / "model").rename(tmp_path / "moved")
    assert find_model(str(run)).companions == run / "hf" / "step_000002"


def tensors_of(folder: Path) -> dict[str, list]:
    return {name: x.tolist() for name, x in load_file(folder / "model.safetensors").items()}


def test_checkpoints_of_a_run_are_converted_and_verified(run, tmp_path, capsys) -> None:
    """By their own folder, that of the weights in them, or the run's; an export is not one."""
    checkpoint = run / "checkpoints" / "step_000003"
    (run / "config.yaml").write_text(CONFIG.format(name="tiny", steps=9, warmup=2, learning_rate=1e-3))
    make_tiny_qwen3(run / "hf" / "step_000009", tied=True, seed=9)
    trained = tensors_of(tmp_path / "trained")
    for number, source in enumerate((checkpoint / "megatron", checkpoint, run)):
        assert find_checkpoint(source).folder == checkpoint / "megatron"
        target = tmp_path / f"back {number}"
        options = ["--verify"] if source == run else []
        assert main(["convert", "megatron-to-hf", str(source), str(target), *options]) == 0
        assert tensors_of(target) == trained and (target / "config.json").exists()
        assert "# tiny, step 3\n" in (target / "README.md").read_text(), "its model card"
    assert "verified logits of 3 prompts" in " ".join(capsys.readouterr().out.split())

    assert main(["convert", "verify", str(run / "hf" / "step_000009"), str(run)]) == 2
    assert "46 tensors differ" in capsys.readouterr().err


def test_a_checkpoint_without_a_configuration_is_converted_with_that_of_its_model(run, tmp_path, capsys) -> None:
    """As Megatron itself writes them. The run's model may have moved as well."""
    foreign, moved = tmp_path / "foreign", tmp_path / "moved"
    shutil.copytree(run / "checkpoints" / "step_000003" / "megatron", foreign)
    (tmp_path / "model").rename(moved)
    (run / "hf" / "step_000002" / "config.json").unlink()
    for number, source in enumerate((foreign, run)):
        target = tmp_path / f"back {number}"
        assert main(["convert", "megatron-to-hf", str(source), str(target)]) == 2
        assert main(["convert", "megatron-to-hf", str(source), str(target), "--model", str(moved)]) == 0
        assert tensors_of(target) == tensors_of(tmp_path / "trained")
    told = capsys.readouterr()
    error = told.err
    assert f"{tmp_path}/back 1/README.md could not be written" in told.out, "for want of the run's configuration"
    assert f"{foreign} has no config.json beside its weights; name the HF folder" in error
    assert "need its config.json and tokenizer" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/new", "has no checkpoint"),
        ("runs/tiny/checkpoints/step_000003/critic", "is not the policy of its checkpoint"),
        ("nowhere/at_all", "no such folder:"),
    ],
)
def test_no_checkpoint(run, tmp_path, name, message) -> None:
    (run / "checkpoints" / "step_000003" / "critic").mkdir()
    (tmp_path / "runs" / "new").mkdir()
    (tmp_path / "runs" / "new" / "config.yaml").touch()
    with pytest.raises(UserError, match=message):
        find_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/tiny/checkpoints", "holds the policies of several steps: name one of them, or"),
        ("runs/tiny/checkpoints/step_000003/critic", "is not the policy of its checkpoint: that is .*/megatron"),
        ("runs", "holds no weights: it is not .* or a run folder"),
        ("runs/tiny/checkpoints/step_000004", "no such folder:"),
        ("runs/new", "has neither an exported policy"),
    ],
)
def test_mistakes(run, tmp_path, name, message) -> None:
    (run / "checkpoints" / "step_000003" / "critic").mkdir()
    (tmp_path / "runs" / "new").mkdir()
    (tmp_path / "runs" / "new" / "config.yaml").touch()
    with pytest.raises(UserError, match=message):
        find_model(str(tmp_path / name))


def test_a_damaged_checkpoint_is_refused(run, tmp_path) -> None:
    file = next((run / "checkpoints" / "step_000003" / "megatron").glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"is damaged: megatron/{file.name} is not the file of {len(content):,} bytes"):
        find_model(str(run))

    file.write_bytes(content)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-5}))
    with pytest.raises(UserError, match="rms_norm_eps"):
        find_model(str(run))
