"""The `dsrl` command: exit statuses, messages, and the dry run. Run as a user would, in separate processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dsrl import __version__
from megatron_dsrl.cli import _parse, main
from megatron_dsrl.common.stop_signals import SAME_REQUEST_SECONDS
from megatron_dsrl.config.load import dump_config, load_config
from megatron_dsrl.config.yaml_text import format_yaml
from megatron_dsrl.run.results import finished_step

REPOSITORY = Path(__file__).parents[1]
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "rope_theta": 1000000,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
RUN = {
    "name": "small",
    "steps": 4,
    "model": {"path": "model", "random_init": True},
    "data": {"source": "train.jsonl", "max_prompt_tokens": 100},
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 60},
    "phases": [{"name": "grpo", "space": {"name": "post_train"}, "advantage": {"name": "group_standardised"}}],
}


OTHER_TENSOR = len(header := b'{"bias":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}').to_bytes(8, "little") + header
"""A safetensors file."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a run configuration, a model's config.json and eight prompts."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "train.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n' * 8)
    (tmp_path / "run.yaml").write_text(format_yaml(RUN))
    return tmp_path


def test_output_is_escaped_where_its_encoding_lacks_a_character(folder) -> None:
    (folder / "train.jsonl").rename(folder / "é.jsonl")
    for encoding, shown in (("ascii", rb"\xe9.jsonl"), ("latin-1", b"\xe9.jsonl"), ("utf-8", "é.jsonl".encode())):
        command = [sys.executable, "-m", "megatron_dsrl.cli", "train", "run.yaml", "data.source=é.jsonl", "--dry-run"]
        result = subprocess.run(command, env=environment(PYTHONIOENCODING=encoding), cwd=folder, capture_output=True)
        assert result.returncode == 0 and shown in result.stdout, (encoding, result.stderr)


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return inherited | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"} | variables


def dsrl(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_dsrl.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(**variables), capture_output=True, text=True, timeout=60, check=False
    )


def test_dry_run_prints_configuration_and_figures_and_starts_nothing(folder) -> None:
    # An option between positionals, and an override after it.
    result = dsrl(folder, "train", "run.yaml", "seed=7", "--dry-run", "rollout.temperature=0.5", "--gpus", "2")
    assert result.returncode == 0 and result.stderr == ""
    assert "seed: 7" in result.stdout and "temperature: 0.5" in result.stdout
    rows = [line.split("│") for line in result.stdout.splitlines()]
    figures = {cells[1].strip(): cells[2].strip() for cells in rows if len(cells) > 3}
    assert figures["data-parallel size"] == "2"
    assert figures["samples per step"] == "16"
    assert figures["epochs"] == "2.00"
    assert {path.name for path in folder.iterdir()} == {"model", "train.jsonl", "run.yaml"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "model holds no weights: neither model.safetensors nor model.safetensors.index.json"),
        (b"<html>", "model.safetensors cannot be read as safetensors"),
        (OTHER_TENSOR, "model: missing tensors: model.embed_tokens.weight"),
    ],
)
def test_dry_run_checks_the_weights(folder, content, message) -> None:
    if content is not None:
        (folder / "model" / "model.safetensors").write_bytes(content)
    result = dsrl(folder, "train", "run.yaml", "--dry-run", "model.random_init=false")
    assert result.returncode == 2 and message in result.stderr


def test_dry_run_imports_nothing_heavy(folder) -> None:
    program = (
        "import sys; from megatron_dsrl.cli import main; status = main(['train', 'run.yaml', '--dry-run']);"
        "print(status, sorted({'sglang', 'megatron', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.stderr == "0 []\n"


def finish(folder: Path) -> None:
    """Leave what a complete run leaves: its configuration and records, a checkpoint and an export of the last step."""
    config, run = load_config(folder / "run.yaml"), folder / "runs" / "small"
    for part in ("checkpoints", "hf"):
        (run / part / "step_000004").mkdir(parents=True)
    dump_config(config, run / "config.yaml")
    (run / "metrics.jsonl").write_text('{"step": 4}\n')


def test_a_finished_run_is_complete_at_once(folder) -> None:
    """Before anything heavy is loaded; a run with a different configuration in the same folder is refused as early."""
    finish(folder)
    program = (
        "import sys; from megatron_dsrl.cli import main; status = main(sys.argv[1:]);"
        "print(status, sorted({'sglang', 'megatron', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )

    def train(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, "train", "run.yaml", *overrides]
        return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60)

    result = train()
    assert result.stderr == "0 []\n"
    assert result.stdout.startswith("runs/small is complete: 4 steps\n") and "dsrl report runs/small" in result.stdout
    other = train("rollout.temperature=0.5")
    assert "runs/small holds a run with a different configuration" in other.stderr and other.stderr.endswith("2 []\n")


@pytest.mark.parametrize("missing", ["checkpoints/step_000004", "hf/step_000004", "metrics.jsonl", "config.yaml"])
def test_a_run_that_lacks_something_is_not_complete(folder, missing, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    finish(folder)
    config, path = load_config("run.yaml"), folder / "runs" / "small" / missing
    assert finished_step(config) == 4
    path.rmdir() if path.is_dir() else path.unlink()
    assert finished_step(config) is None


def test_processes_are_started_and_give_the_commands_status(folder) -> None:
    """Both meet the same mistake; only rank 0 says so."""
    result = dsrl(folder, "train", "run.yaml", "--processes", "2", "parallel.pipeline_parallel_size=3")
    assert result.returncode == 2
    assert result.stderr.count("2 processes cannot be divided by that") == 1


def test_modules_of_the_current_folder_are_found(folder) -> None:
    """By the installed command, whose own folder Python would search in its place."""
    (folder / "own_loss.py").write_text("")
    program = "import sys; sys.path.remove(''); from megatron_dsrl.cli import main; sys.exit(main())"
    own = "phases.0.loss={name: 'own_loss:Halved'}"
    command = [sys.executable, "-c", program, "train", "run.yaml", own]
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60)
    assert "`own_loss` has no loss `Halved`" in result.stderr


def test_version(folder) -> None:
    result = dsrl(folder, "--version")
    assert (result.returncode, result.stdout) == (0, f"megatron-dsrl {__version__}\n")


def test_world_size_comes_from_torchrun(folder) -> None:
    result = dsrl(folder, "train", "run.yaml", "--dry-run", "parallel.tensor_parallel_size=2", WORLD_SIZE="3")
    assert result.returncode == 2
    assert "3 processes cannot be divided by that" in result.stderr


def test_files_and_overrides_come_in_any_order_around_options() -> None:
    words = ["train", "lr=1/size.yaml", "seed=2", "--dry-run", "runs/lr=1/method.yaml", "data.source=a/b.jsonl"]
    options = _parse(words)
    assert options.config == ["lr=1/size.yaml", "runs/lr=1/method.yaml"] and options.dry_run
    assert options.overrides == ["seed=2", "data.source=a/b.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "dsrl: nowhere.yaml: no such configuration file\n"),
        (["train", "run.yaml", "rollout.temprature=1"], "rollout.temprature: unknown key; did you mean temperature?"),
        (["train", "run.yaml", "model.path=nowhere/at/all"], "model.path: no such folder: nowhere/at/all"),
        (["train", "run.yaml", "data.source=nowhere.jsonl"], "data.source: no such file: nowhere.jsonl"),
        (["train", "run.yaml", "--dry-run", "--processes", "0"], "expected a positive integer, got 0"),
        (["train", "run.yaml", "--dryrun"], "unrecognized arguments: --dryrun"),
        (["train", "run.yaml", "--steps=5"], "--steps=5; fields are set without dashes: steps=5"),
        (["train"], "the following arguments are required: CONFIG.yaml\n"),
        (["plan", "run.yaml", "--training-utilisation", "0"], "expected a number above 0, got 0"),
        (["plan", "run.yaml", "--training-utilisation", "40"], "expected a share above 0 and at most 1, got 40"),
        (["serve", "run.yaml", "--port", "70000"], "expected a port from 1 to 65535, got 70000"),
        (["samples", "nowhere"], "no such folder: nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["doctor", "a=b"], "unrecognized arguments: a=b"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "    doctor    check the installation"),
        (["analyse"], "usage: dsrl analyse [-h] KIND ..."),
    ],
)
def test_a_users_mistake_is_one_message_and_status_2(folder, arguments, message) -> None:
    result = dsrl(folder, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_only_rank_0_speaks_of_a_wrong_configuration(folder) -> None:
    result = dsrl(folder, "train", "nowhere.yaml", RANK="1", WORLD_SIZE="2")
    assert result.returncode == 2
    assert result.stdout == "" and result.stderr == ""


def in_place_of_train(folder: Path, body: str) -> list[str]:
    """A command that runs `dsrl train run.yaml` with a `megatron_dsrl.train` whose `train` is `body`.

    The real loop would need a model and an engine; what is under test is what the command makes of its end.
    """
    program = f"""
import sys, types
module = types.ModuleType("megatron_dsrl.train")
exec({body!r}, module.__dict__)
sys.modules["megatron_dsrl.train"] = module
from megatron_dsrl.cli import main
sys.exit(main(["train", "run.yaml"]))
"""
    return [sys.executable, "-c", program]


@pytest.mark.parametrize(
    ("rank", "stderr"), [("0", "dsrl: data.source: no rows\n"), ("3", "dsrl: rank 3: data.source: no rows\n")]
)
def test_a_user_error_found_during_the_run_is_reported_by_every_rank(folder, rank, stderr) -> None:
    body = (
        "from megatron_dsrl.common.errors import UserError\n"
        "def train(config, starting): raise UserError('data.source: no rows')"
    )
    command = in_place_of_train(folder, body)
    result = subprocess.run(
        command, cwd=folder, env=environment(RANK=rank, WORLD_SIZE="4"), capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (2, stderr)


def test_a_defect_keeps_its_traceback(folder) -> None:
    command = in_place_of_train(folder, "def train(config, starting): return config.no_such_section")
    result = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "no_such_section" in result.stderr


def start_in_place_of_train(folder: Path, body: str) -> "subprocess.Popen[str]":
    """`in_place_of_train`, once it has printed "started"."""
    process = subprocess.Popen(
        in_place_of_train(folder, body),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.stdout.readline() != "started\n":  # after the batch sizes in words
        assert process.poll() is None
    return process


@pytest.mark.parametrize(
    ("sent", "line"),
    [("SIGINT", "interrupted"), *((name, f"ended by {name}") for name in ("SIGTERM", "SIGHUP", "SIGUSR1"))],
)
def test_an_interrupted_run_cleans_up_and_says_what_ended_it(folder, sent, line) -> None:
    number = signal.Signals[sent]
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored here, as SIGHUP is under nohup, and so by what is started")
    body = """
import time
def train(config, starting):
    try:
        print("started", flush=True)
        time.sleep(30)
    finally:
        print("cleaned up", flush=True)
"""
    process = start_in_place_of_train(folder, body)
    process.send_signal(number)
    started = time.monotonic()
    stdout, stderr = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode == 128 + number
    assert stdout == "cleaned up\n"
    assert stderr == f"dsrl: {line}\n"


def test_an_error_that_an_interruption_has_caused_is_not_reported(folder) -> None:
    """A library swallows the exception of the signal and fails later, as do imports of compiled modules."""
    body = """
import time
def train(config, starting):
    try:
        print("started", flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        raise ImportError("only half of this module has been imported")
"""
    process = start_in_place_of_train(folder, body)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "dsrl: interrupted\n")


MANY_REQUESTS = """
import asyncio
from megatron_dsrl.common.stop_signals import run_interruptible
from megatron_dsrl.run.preemption import Preempted, StopRequested, StopSignal

async def request(number):
    try:
        while True:  # so that a signal comes while a request is being worked on
            await asyncio.sleep(0)
    finally:
        if number == 0:
            print("cancelled", flush=True)
        await asyncio.sleep(CLOSING)

async def sample():
    requests = [asyncio.create_task(request(number)) for number in range(1000)]
    await asyncio.sleep(0)
    print("started", flush=True)
    await asyncio.gather(*requests)  # ends when all of them have, also if it is cancelled

def evaluate(): run_interruptible(sample())

def training():
    with StopSignal() as stop:
        try:
            with stop.interruptible():
                run_interruptible(sample())
        except StopRequested:
            raise Preempted

def train(config, starting): WORK()
"""


def start_many_requests(folder: Path, work: str, closing: int) -> "subprocess.Popen[str]":
    """A command with a thousand requests, each of which takes `closing` seconds to close."""
    return start_in_place_of_train(folder, MANY_REQUESTS.replace("CLOSING", str(closing)).replace("WORK", work))


@pytest.mark.parametrize(
    ("work", "status", "line"), [("evaluate", 143, "dsrl: ended by SIGTERM\n"), ("training", 75, "")]
)
def test_requests_that_a_signal_interrupts_are_not_reported(folder, work, status, line) -> None:
    process = start_many_requests(folder, work, closing=0)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (status, line)


def test_a_signal_that_a_launcher_passes_on_as_well_is_one_request(folder) -> None:
    process = start_many_requests(folder, "training", closing=1)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "cancelled\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (75, "")


@pytest.mark.parametrize("work", ["evaluate", "training"])
@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGUSR1", "SIGTERM")])
def test_a_second_signal_ends_the_command_at_once_with_one_line(folder, work, first, second) -> None:
    """Also while a thousand requests are being cancelled."""
    process = start_many_requests(folder, work, closing=3600)
    process.send_signal(signal.Signals[first])
    assert process.stdout.readline() == "cancelled\n"
    time.sleep(SAME_REQUEST_SECONDS)
    process.send_signal(signal.Signals[second])
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.Signals[second]
    assert stderr == f"dsrl: second signal ({second}); exiting at once\n"


@pytest.mark.parametrize("arguments", [["completion", "bash"], ["config"], ["train", "run.yaml", "--dry-run"]])
def test_a_reader_that_closes_the_pipe_ends_the_command_quietly(folder, arguments) -> None:
    command = [sys.executable, "-m", "megatron_dsrl.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment(), **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


def test_output_that_cannot_be_written_is_one_message(folder) -> None:
    finish(folder)
    (folder / "runs" / "small" / "metrics.jsonl").unlink()
    (folder / "file").write_text("")
    for command in (["report", "runs/small", "--output", "file/page.html"], ["report", "runs/small", "--output", "."]):
        result = dsrl(folder, *command)
        assert result.returncode == 2 and result.stderr.endswith("; correct the path\n"), result.stderr
        assert result.stderr.startswith("dsrl: ") and "Traceback" not in result.stderr


def test_help_names_the_commands(folder) -> None:
    result = dsrl(folder, "--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("train", "report", "doctor"))


def test_a_shell_completes_commands_and_options(folder, capsys) -> None:
    """By a real bash, with the function of the script."""
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = """
    complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_dsrl; printf '%s\\n' "${COMPREPLY[@]}"; }
    complete_words dsrl tr
    complete_words dsrl train --dry
    complete_words dsrl train ru
    """
    bash = ["bash", "-c", f"{script}\n{ask}"]
    result = subprocess.run(bash, cwd=folder, capture_output=True, text=True, timeout=60)
    assert {"trace", "train", "--dry-run", "run.yaml"} <= {line.strip() for line in result.stdout.splitlines()}
