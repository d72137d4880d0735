"""`dsrl push` by the hub's real clients, against a stand-in for the hub, a closed port, and a hub that refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dsrl.cli import main
from tests.observability.synthetic_run import start_record, write_run, write_starts
from tests.support.hub import READ_ONLY_TOKEN, stand_in_hub
from tests.support.tiny_run import REPOSITORY

CLOSED_ADDRESS = "http://127.0.0.1:9"
PUSH = """
import os, sys, time
time.sleep = lambda seconds: None  # the clients wait between their attempts
from megatron_dsrl.cli import main
for command in sys.argv[1:]:
    token, *arguments = command.split()
    os.environ["HF_TOKEN"] = token.removeprefix("token=")
    print("-> status", main(["push", *arguments]), flush=True)
"""
FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with an exported policy and other files beside it."""
    folder = tmp_path / "tiny"
    write_run(folder, steps=4)
    write_starts(folder, start_record())
    export = folder / "hf" / "step_000004"
    export.mkdir(parents=True)
    for name in (*FILES, "provenance.jsonl", "notes.txt"):
        (export / name).write_text(f"{name} of the policy")
    return folder


def pushed(endpoint: str, home: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """`dsrl push` with each of some tokens and command lines, in a process whose hub is at an address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", PUSH, *commands],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def test_policy_and_card_arrive_and_nothing_else(run: Path, tmp_path: Path) -> None:
    """Private; publicly elsewhere; refused privately where it is public, without the right to write, without token."""
    with stand_in_hub() as hub:
        ended = pushed(
            hub.url,
            tmp_path,
            f"token=hf_write {run} me/tiny --private",
            f"token=hf_write {run}/hf/step_000004 me/public",
            f"token=hf_write {run} me/public --private",
            f"token={READ_ONLY_TOKEN} {run} me/other",
            f"token= {run} me/other",
        )
    statuses = [line for line in ended.stdout.splitlines() if line.startswith("-> ")]
    assert statuses == ["-> status 0"] * 2 + ["-> status 2"] * 3, ended.stderr
    assert f"uploading 3 files, 0.00 GB and the card to {hub.url}/me/tiny (private)" in ended.stdout
    messages = [line for line in ended.stderr.splitlines() if line.startswith("dsrl: ")]
    assert messages[0].startswith(f"dsrl: --private: {hub.url}/me/public exists and is public")
    assert messages[1].startswith("dsrl: me/other could not be uploaded: the token cannot write there")
    assert messages[2].startswith("dsrl: no token for the hub: set HF_TOKEN")
    assert hub.private == {"me/tiny": True, "me/public": False}
    assert hub.messages == ["Policy after step 4, by megatron-dsrl"] * 2, "nothing is uploaded where it is refused"
    for repository in ("me/tiny", "me/public"):
        files = hub.files[repository]
        assert sorted(files) == ["README.md", *FILES]
        assert all(files[name].decode() == f"{name} of the policy" for name in FILES)
        assert "model-index:" in files["README.md"].decode()


def test_a_hub_that_cannot_be_reached(run: Path, tmp_path: Path) -> None:
    ended = pushed(CLOSED_ADDRESS, tmp_path, f"token=hf_write {run} me/tiny")
    assert ended.stdout == "-> status 2\n", ended.stderr
    assert f"dsrl: me/tiny could not be uploaded: {CLOSED_ADDRESS} cannot be reached from here" in ended.stderr


def test_a_dry_run_writes_the_folder_to_upload_and_changes_nothing_else(run: Path, capsys) -> None:
    command = ["push", str(run), "me/tiny", "--base-model", "Qwen/Qwen3-8B", "--dry-run"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"would upload 3 files, 0.00 GB and the card of {run}/hf/step_000004 to me/tiny:" in shown
    assert "  model.safetensors  31 bytes" in shown and "notes.txt" not in shown and "provenance.jsonl" not in shown
    assert "base_model: Qwen/Qwen3-8B" in shown and "# tiny, step 4" in shown
    policy = run / "hf" / "step_000004"
    assert not (policy / "README.md").exists()
    written = {file.name: file.read_text() for file in (policy / "upload").iterdir()}
    assert written.pop("README.md").startswith("---\nbase_model: Qwen/Qwen3-8B\n")
    assert written == {name: f"{name} of the policy" for name in FILES}
    assert shown.endswith(f"written to {policy}/upload\n")
    assert main(command) == 0, "a second dry run replaces the first"


@pytest.mark.parametrize(
    ("options", "named"), [([], "base"), (["--base-model", "Qwen/Qwen3-8B"], "Qwen/Qwen3-8B")], ids=["folder", "hub"]
)
def test_adapters_are_uploaded_without_the_folder_of_their_base_model(run: Path, capsys, options, named) -> None:
    """And a chat template in its own folder stays in it."""
    policy = run / "hf" / "step_000004"
    for name in ("adapter/adapter_model.safetensors", "additional_chat_templates/tools.jinja"):
        (policy / name).parent.mkdir()
        (policy / name).write_text(name)
    trained_on = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "/home/someone/base"}
    (policy / "adapter" / "adapter_config.json").write_text(json.dumps(trained_on))
    assert main(["push", str(run), "me/tiny", "--dry-run", *options]) == 0
    assert "  adapter/adapter_model.safetensors  33 bytes" in capsys.readouterr().out
    assert main(["push", str(run), "me/tiny", "--dry-run", *options]) == 0, "a second dry run replaces the first"
    upload = policy / "upload"
    written = {str(file.relative_to(upload)) for file in upload.rglob("*") if file.is_file()}
    assert written == {
        "README.md", *FILES, "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "additional_chat_templates/tools.jinja",
    }  # fmt: skip
    configuration = json.loads((upload / "adapter" / "adapter_config.json").read_text())
    assert configuration == trained_on | {"base_model_name_or_path": named}
    assert json.loads((policy / "adapter" / "adapter_config.json").read_text()) == trained_on


def test_a_dry_run_keeps_a_folder_of_other_files(run: Path, capsys) -> None:
    mine = run / "hf" / "step_000004" / "upload" / "mine.txt"
    mine.parent.mkdir()
    mine.touch()
    assert main(["push", str(run), "me/tiny", "--dry-run"]) == 2
    assert "has files that do not belong to the upload (mine.txt); remove the folder" in capsys.readouterr().err
    assert mine.exists()


def test_a_users_own_card_is_uploaded_unchanged(run: Path, capsys) -> None:
    card = run / "hf" / "step_000004" / "README.md"
    card.write_text("# My own words\n")
    assert main(["push", str(run), "me/tiny", "--dry-run"]) == 0
    assert "and this README.md:\n\n# My own words\n" in capsys.readouterr().out
    assert main(["push", str(run), "me/tiny", "--base-model", "Qwen/Qwen3-8B", "--dry-run"]) == 2
    assert "README.md stays as it is; set base_model there" in capsys.readouterr().err


def test_what_cannot_be_pushed(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "plain").mkdir()
    for name in FILES:
        (tmp_path / "plain" / name).touch()
    for arguments, message in (
        ([str(tmp_path / "gone"), "me/tiny"], "no such folder:"),
        ([str(run), "tiny"], "`tiny`: name the owner too, as in OWNER/NAME"),
        ([str(run), "me/tiny!"], "`me/tiny!` is not a valid name on the hub"),
        ([str(tmp_path / "plain"), "me/tiny"], "has no model card: write README.md there"),
    ):
        assert main(["push", *arguments, "--dry-run"]) == 2
        assert message in capsys.readouterr().err
