"""The first run on GPUs: its stages, where it stops, what it says then, and what is in the archive."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from megatron_dsrl.config.load import load_config
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.planning.fit import run_memory
from megatron_dsrl.planning.gpus import GPUS
from megatron_dsrl.run.preflight import preflight
from tests.support.tiny_run import REPOSITORY
from tools.first_gpu_run.__main__ import main
from tools.first_gpu_run.bundle import contents, write_bundle
from tools.first_gpu_run.run_files import write_run
from tools.first_gpu_run.runner import run_stages
from tools.first_gpu_run.secrets import REMOVED, environment_lines, without_secrets
from tools.first_gpu_run.stages import BENCHMARKS, BENCHMARKS_ON_CPU, FRACTIONS, GPU_TESTS, LARGE, Stage, all_stages
from tools.gpu_record.record import Record, Result

TRAININGS = [stage for stage in all_stages(8) if stage.training is not None]
SECRET = "s3cr3t-v4lue-0f-a-token"


def command(name: str, program: str, gpus: int = 0) -> Stage:
    return Stage(name, f"{name} works", gpus, 1, arguments=("-c", program), shown_lines=3)


WELL = command("well", "print('all is well')")
BAD = command("bad", f"import sys; print('api_key=0123456789abcdef {SECRET}'); sys.exit('no kernel image')")
LARGER = command("larger", "print('not run')", gpus=8)


def empty_record(folder: Path) -> Record:
    return Record("The first run", folder, {"commit": "c0ffee", "device": "CPU"}, on_cpu=True)


def run(stages: list[Stage], record: Record) -> Result | None:
    return run_stages(stages, record, 2, {}, Console(quiet=True))


def test_the_gpu_tests_are_all_that_are_marked() -> None:
    files = (REPOSITORY / "tests").rglob("test_*.py")
    marked = {str(file.relative_to(REPOSITORY)) for file in files if re.search(r"\bmark\.gpu\b", file.read_text())}
    assert marked == set(GPU_TESTS)


def test_stages_have_distinct_names_and_need_more_and_more_gpus() -> None:
    names = [stage.name for stage in all_stages(8)]
    assert len(set(names)) == len(names) and not any(re.search(r"[^\w.]", name) for name in names)
    needed = [stage.gpus for stage in all_stages(8) if stage not in BENCHMARKS]
    assert needed == sorted(needed) and needed[0] == 0 and needed[-1] == 8


def test_benchmarks_exist_and_have_arguments_for_a_dry_run() -> None:
    assert {stage.name for stage in BENCHMARKS} == set(BENCHMARKS_ON_CPU)
    assert [stage for stage in BENCHMARKS if not (REPOSITORY / stage.arguments[0]).exists()] == []


def test_memory_fractions_are_tried_on_the_largest_model_that_the_machine_can_train() -> None:
    by_gpus = {gpus: [stage for stage in all_stages(gpus) if stage.name.startswith("memory")] for gpus in (1, 2, 8)}
    assert {gpus: {stage.gpus for stage in stages} for gpus, stages in by_gpus.items()} == {1: {1}, 2: {1}, 8: {8}}
    tried = [stage.training.overrides["engine.memory_fraction"] for stage in by_gpus[8] if stage.training]
    assert tried == sorted(tried) == list(FRACTIONS)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("stage", TRAININGS, ids=lambda stage: stage.name)
def test_every_training_is_a_valid_run_that_fits_80_gb(stage, dry_run, tmp_path) -> None:
    """The largest memory fractions of the 8B model are for larger GPUs; on this one they are skipped."""
    files = write_run(tmp_path / stage.name, stage, dry_run)
    config = load_config([REPOSITORY / file for file in files.files], files.overrides)
    architecture = read_architecture(files.model_folder)
    preflight(config, files.processes)
    assert [phase.name for phase in config.phases] == ["NSR-PreRL", "GRPO"] and config.phases[0].until_step == 1
    assert config.parallel.collective_timeout_seconds < stage.limit_minutes * 60
    assert files.processes == (min(stage.gpus, 4) if dry_run else stage.gpus)
    fits = run_memory(config, architecture, GPUS["h100"].memory_bytes, files.processes).fits
    assert fits or (stage.name in ("memory_0.75", "memory_0.85") and not dry_run and stage.training.model == LARGE)


def test_it_stops_at_the_first_failure_and_skips_what_needs_more_gpus(tmp_path) -> None:
    record = empty_record(tmp_path)
    failed = run([WELL, LARGER, BAD, WELL], record)
    assert failed is not None and failed.name == "bad" and failed.reason is not None
    assert failed.reason.startswith("exit status 1 after") and failed.output[-1] == "no kernel image"
    assert [(result.name, result.status) for result in record.results] == [
        ("well", "passed"), ("larger", "skipped"), ("bad", "failed"),
    ]  # fmt: skip
    assert record.results[0].output == ["all is well"]
    assert record.results[1].reason == "needs 8 GPUs, this machine has 2"


def test_the_archive_has_logs_records_and_flight_recorder_but_no_secrets(tmp_path) -> None:
    record = empty_record(tmp_path)
    run([WELL, BAD], record)
    run_folder = tmp_path / "bad" / "run"
    for name in ("collectives/rank_0", "engines/engine_0.log", "provenance.jsonl", "rollouts/step.jsonl"):
        (run_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run_folder / name).write_bytes(b"\x80\x04 binary" if "rank" in name else f"key: {SECRET}".encode())
    archive = write_bundle(tmp_path, "bad", {"HF_TOKEN": SECRET, "CUDA_VISIBLE_DEVICES": "0,1", "EDITOR": "vi"})
    assert {name.removeprefix("bug_report/") for name in contents(archive)} == {
        "environment.txt", "packages.txt", "system.txt", "record.json", "record.md", "well/output.log",
        "bad/output.log", "bad/run/collectives/rank_0", "bad/run/engines/engine_0.log", "bad/run/provenance.jsonl",
    }  # fmt: skip
    with tarfile.open(archive) as opened:
        texts = {name: opened.extractfile(name).read() for name in opened.getnames()}  # type: ignore[union-attr]
    assert not any(SECRET.encode() in text or b"0123456789abcdef" in text for text in texts.values())
    assert b"no kernel image" in texts["bug_report/bad/output.log"] and b"torch==" in texts["bug_report/packages.txt"]
    assert texts["bug_report/environment.txt"].decode().splitlines() == [
        "CUDA_VISIBLE_DEVICES=0,1", "EDITOR=[not shown]", f"HF_TOKEN={REMOVED}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer abcdefgh12345678",
        "ServerArgs(api_key='abcdefgh12345678', port=1)",
        '"password": "abcdefgh12345678"',
        "https://user:abcdefgh12345678@host/x",
        "hf_abcdefgh12345678abcdefgh12345678",
        "token=abcdefgh12345678",
    ],
)
def test_secrets_are_found_by_their_form(text) -> None:
    assert "abcdefgh12345678" not in without_secrets(text, {})


def test_what_is_not_a_secret_stays() -> None:
    text = "token=None max_tokens=4096 tokenizer=Qwen/Qwen3-8B https://host/x api_key=None 512 tokens: 0.5"
    assert without_secrets(text, {"WANDB_API_KEY": "1", "TOKENIZERS_PARALLELISM": "false"}) == text
    assert environment_lines({"TOKENIZERS_PARALLELISM": "false", "SLURM_JOB_ID": "7", "MY_KEY": "x"}) == [
        f"MY_KEY={REMOVED}", "SLURM_JOB_ID=7", "TOKENIZERS_PARALLELISM=[not shown]",
    ]  # fmt: skip


def test_a_failure_says_what_to_attach_and_how_to_continue(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("tools.first_gpu_run.__main__.all_stages", lambda gpus: (WELL, BAD))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--dry-run", "--output", str(tmp_path)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "Stopped at bad: exit status 1" in printed and "It was meant to prove: bad works." in printed
    assert f"attach {tmp_path}/bug_report.tar.gz" in printed
    assert f"python -m tools.first_gpu_run --dry-run --output {tmp_path} --from bad" in printed
    monkeypatch.setattr("tools.first_gpu_run.__main__.all_stages", lambda gpus: (WELL, command("bad", "print('now')")))
    assert main(["--dry-run", "--output", str(tmp_path), "--from", "bad"]) == 0
    assert "No stage failed" in capsys.readouterr().out
    assert "| well | passed |" in (tmp_path / "record.md").read_text()


def test_an_unknown_stage_and_a_machine_without_gpus_are_refused(capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--dry-run", "--only", "doctor,nine_gpus"])
    assert refused.value.code == 2 and "unknown stage nine_gpus; the stages are doctor, " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_dry_run_runs_every_stage(tmp_path) -> None:
    arguments = [sys.executable, "-m", "tools.first_gpu_run", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=2300)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr
    text = (tmp_path / "record.md").read_text()
    assert re.findall(r"^\| (\S+) \| passed", text, re.M) == [stage.name for stage in all_stages(8)]
    assert text.count("| engine, attention_backend | torch_native |") == len(TRAININGS)
    assert text.count("| actor, MFU | no peak known |") == len(TRAININGS) and "incomplete" not in text
