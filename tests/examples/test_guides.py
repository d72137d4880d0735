"""The documents say what is: their commands are accepted and, where seconds suffice, run; what they name exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_dsrl.cli import _parse, main
from megatron_dsrl.config.benchmark import load_benchmark
from megatron_dsrl.config.load import load_config
from tests.configs.test_configs import MODELS
from tests.support.documents import (
    DOCUMENTS,
    broken_anchors,
    commands,
    fields_named,
    files_named,
    is_field,
    is_message,
    messages_quoted,
    name,
)
from tests.support.tiny_run import REPOSITORY, write_tiny_run

EXAMPLES = REPOSITORY / "examples"
EVERY_COMMAND = [command for document in DOCUMENTS for command in commands(document)]
RUN_HERE = {
    command.line: command
    for command in sorted(EVERY_COMMAND, key=lambda command: len(command.shown))  # of equal ones, that with the output
    if (arguments := command.dsrl_arguments())
    and (arguments[0] in ("config", "plan") or "--dry-run" in arguments)
    and arguments[0] != "push"
}
"""Commands that take a second: plans, dry runs, explanations; not those that need a finished run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the documents' commands find what they name: the repository's folders, and models."""
    folder = tmp_path_factory.mktemp("guides")
    for part in ("configs", "examples", "slurm"):
        (folder / part).symlink_to(REPOSITORY / part)
    for model, config in MODELS.items():
        (folder / model).mkdir(parents=True)
        (folder / model / "config.json").write_text(json.dumps(config))
    tiny = folder / ".cache" / "tiny_dsrl"
    tiny.mkdir(parents=True)
    write_tiny_run(tiny)
    (tiny / "model").rename(tiny / "base")
    for part in ("train.jsonl", "held_out.jsonl"):
        (tiny / part).symlink_to(tiny / "prompts.jsonl")
    (folder / ".cache" / "own_data").mkdir()
    return folder


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_are_accepted(document, capsys) -> None:
    """By the command line, and the overrides by the configuration that they are for."""
    for command in commands(document):
        if (arguments := command.dsrl_arguments()) is None:
            continue
        try:
            options = _parse(arguments)
        except SystemExit:
            pytest.fail(f"{command.line}\n{capsys.readouterr().err}")
        files = [REPOSITORY / file for file in getattr(options, "config", [])]
        if files and all(file.exists() for file in files):
            load_config(files, options.overrides)


@pytest.mark.parametrize("line", RUN_HERE)
def test_plans_and_dry_runs_run_and_print_what_is_shown(line, folder, monkeypatch, capsys) -> None:
    """Where a document shows output, its lines stand in the program's in this order; `...` leaves some out."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "112")
    monkeypatch.setattr("megatron_dsrl.run.preflight.check_weight_files", lambda config: None)  # most have none here
    command = RUN_HERE[line]
    if (source := _parquet(command.words)) is not None:
        subprocess.run(_parquet_command(), cwd=folder, check=True, timeout=60)
        assert (folder / source).exists()
    assert main(command.dsrl_arguments()) == 0
    printed = iter([row.rstrip() for row in capsys.readouterr().out.splitlines()])
    for row in command.shown:
        if row != "...":
            assert row.rstrip() in printed, f"{line} no longer prints\n{row}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_what_a_document_names_exists(document) -> None:
    assert [str(file) for file in files_named(document) if not file.exists()] == []
    assert [path for path in fields_named(document) if not is_field(path)] == []
    assert broken_anchors(document) == []


def test_job_scripts_and_their_variables() -> None:
    """Every script that is submitted exists, and takes every variable that a document sets or explains."""
    known = (REPOSITORY / "slurm" / "dsrl_8b.sh").read_text()
    for document in DOCUMENTS:
        text = document.read_text()
        for line in re.findall(r"^.*\bsbatch .*$", text, re.M):
            for variable in re.findall(r"\b([A-Z_]+)=", line):
                assert re.search(rf"^{variable}=", known, re.M), line
    reproduction = (EXAMPLES / "reproduction" / "README.md").read_text()
    explained = set(re.findall(r"`([A-Z_]{4,})`", reproduction)) - {"SBATCH_ACCOUNT", "SBATCH_PARTITION"}
    assert explained == set(re.findall(r"^([A-Z_]+)=", known, re.M))
    steps = re.search(r"STEPS:-([a-z_ ]+)", known).group(1).split()
    assert re.findall(r"^\| `([a-z_]+)` \|", reproduction, re.M)[: len(steps)] == steps


def test_every_number_of_the_paper_is_in_its_field() -> None:
    text = (EXAMPLES / "reproduction" / "README.md").read_text()
    rows = re.findall(r"^\|[^|]*\| `([a-z_0-9.]+)` \| `([^`]+)` \|$", text, re.M)
    resolved = load_config(REPOSITORY / "configs" / "dsrl_qwen3_8b.yaml").model_dump(mode="json")
    assert len(rows) > 40
    for path, value in rows:
        found = resolved
        for key in path.split("."):
            found = found[int(key)] if isinstance(found, list) else found[key]
        assert found == yaml.safe_load(value), path
    grpo = load_config(REPOSITORY / "configs" / "grpo_qwen3_8b.yaml")
    assert grpo.phases[0].loss.clip_high == 0.28


def test_every_key_of_verl_has_a_field_that_takes_the_values_named() -> None:
    text = (EXAMPLES / "reproduction" / "README.md").read_text()
    section = text.partition("## From verl's keys to ours")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `[^|]*`(?: of a row)? \| ([^|]*) \| ([^|]*)\|$", section, re.M)
    fields = [field for fields, _ in rows for field in re.findall(r"`([^`]+)`", fields)]
    assert len(rows) > 50 and [field for field in fields if not is_field(field)] == []
    base = REPOSITORY / "configs" / "dsrl_qwen3_8b.yaml"
    kl = "phases.1.kl={loss_coefficient: 0.1}"
    named = [(field, value) for field, words in rows for value in re.findall(r" is `([a-z_0-9]+)`", words)]
    assert len(named) > 20
    for field, value in named:
        load_config(base, [kl, f"{field.strip('`')}={value}"])


def test_error_messages_are_the_programs() -> None:
    quoted = messages_quoted(EXAMPLES / "troubleshooting" / "README.md")
    assert len(quoted) > 20
    assert [message for message in quoted if not is_message(message)] == []


def test_own_data_as_the_model_sees_it(folder) -> None:
    """The preview runs as written and prints what the document shows; the benchmark loads."""
    (command,) = [
        command
        for command in commands(EXAMPLES / "own_data" / "README.md")
        if "examples.own_data.preview" in command.words and command.shown
    ]
    result = subprocess.run(
        [sys.executable, *command.words[1:]],
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    printed = iter([row.rstrip() for row in result.stdout.splitlines()])
    assert [row for row in command.shown if row != "..." and row not in printed] == []
    benchmark = load_benchmark(str(EXAMPLES / "own_data" / "benchmark.yaml"), EXAMPLES / "own_data")
    assert Path(benchmark.config.source).name == "held_out.jsonl"


def _parquet(words: tuple[str, ...]) -> str | None:
    return next((word.partition("=")[2] for word in words if word.endswith(".parquet")), None)


def _parquet_command() -> list[str]:
    found = [c.words for c in commands(EXAMPLES / "own_data" / "README.md") if c.words[:2] == ("python", "-c")]
    return [sys.executable, *found[0][1:]]
