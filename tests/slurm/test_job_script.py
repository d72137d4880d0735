"""What slurm/job.sh does at the end of a step, without SLURM: `srun` exits as instructed, `scontrol` records its call.

The scripts under a real SLURM are tested in test_jobs.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.documents import DOCUMENTS, commands
from tests.support.tiny_run import REPOSITORY, write_tiny_run

SRUN = """#!/usr/bin/env bash
echo "$*" >>"$STUBS/srun.log"
for word in "$@"; do
    case "$word" in doctor | fetch | train | --dry-run | eval | convert | report) work="$word" ;; esac
done
eval "$ON_SRUN"
exit "$(cat "$STUBS/status_of_${work:-other}" 2>/dev/null || echo 0)"
"""
REALLY = 'exec "${@:4}"'
"""Run the command of a single process, which follows three options."""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$STUBS/scontrol.log"
"""
SBATCH = """#!/usr/bin/env bash
for word in "$@"; do
    case "$word" in --array=1-3) tasks="1 2 3" ;; --nodes=*) nodes="${word#*=}" ;; -*) exit 1 ;; esac
done
printf '%s\\n' "$CONFIG" "$POLICY" "$RUN_NAME" "$CONTAINER" >"$STUBS/wanted"
export SLURM_SUBMIT_DIR="$PWD" SLURM_NTASKS="$((8 * ${nodes:-1}))"
[ -n "${tasks:-}" ] || exec bash "$word"
for task in $tasks; do SLURM_ARRAY_TASK_ID="$task" bash "$word" || exit; done
"""
TRAINED = """
case "$work $*" in
    train*) all="$*"; name="${all##* name=}"; mkdir -p "$OUTPUT_DIR/${name%% *}/hf/step_000348" ;;
    *model.path*) echo a/model ;;
esac
"""
"""The model's name is asked for, and a training leaves a policy."""
SUBMISSIONS = sorted(
    c.line
    for c in {c.line: c for document in DOCUMENTS for c in commands(document)}.values()
    if "sbatch" in c.words and "examples/laboratory/run.sh" not in c.words  # which trains without srun
)

RunScript = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def stubs(tmp_path) -> Path:
    """Folder of the commands that job.sh finds instead of SLURM's."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "sleep": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def run_script(tmp_path, stubs) -> RunScript:
    """Run a script of slurm/; `statuses` are those with which `dsrl eval` and others end, 0 if they are not named."""

    def run(
        script: str = "dsrl_8b.sh", statuses: dict[str, int] | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        for work, status in (statuses or {}).items():
            (stubs / f"status_of_{work}").write_text(str(status))
        environment = os.environ | {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "STUBS": str(stubs),
            "ON_SRUN": "",
            "DSRL_ROOT": str(REPOSITORY),
            "OUTPUT_DIR": str(tmp_path / "runs"),
            "RUN_NAME": "run",
            "VENV": sys.prefix,
            "MEGATRON_FOLDER": "",
            "POLICY": "a/model",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node",
            "SLURM_NTASKS": "8",
        }
        return subprocess.run(
            ["bash", str(REPOSITORY / "slurm" / script)],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )

    return run


def requeued(stubs: Path) -> int:
    """How often the job has asked to be requeued."""
    calls = stubs / "scontrol.log"
    return calls.read_text().count("requeue 7") if calls.exists() else 0


@pytest.mark.parametrize("work, status", [("eval", 138), ("eval", 75), ("train", 75), ("train", 138), ("report", 143)])
def test_a_job_asked_to_stop_is_requeued_and_is_not_a_crash(run_script, stubs, tmp_path, work, status) -> None:
    for attempt in range(4):  # more than crashes are allowed
        assert run_script(statuses={work: status}, SLURM_RESTART_COUNT=str(attempt)).returncode == status
        assert requeued(stubs) == attempt + 1
    last = run_script(SLURM_RESTART_COUNT="19")
    assert requeued(stubs) == 4 and "attempt 19 was the last of 20" in last.stdout


@pytest.mark.parametrize("work, name", [("train", "training"), ("eval", "evaluation")])
@pytest.mark.parametrize("status", [1, 137, 143])  # srun gives 143 as well when one rank has crashed
def test_three_crashes_in_a_row_without_progress_end_the_job(run_script, stubs, work, name, status) -> None:
    outputs = [run_script(statuses={work: status}).stdout for _ in range(3)]
    for number, output in enumerate(outputs, start=1):
        assert f"{name} exited with status {status}, crash {number} of 3 without a new checkpoint or sample" in output
    assert requeued(stubs) == 2


def test_an_evaluation_that_gets_further_may_crash_again(run_script, stubs, tmp_path) -> None:
    samples = tmp_path / "runs" / "run" / "evaluation" / "samples"
    further = f'[ "$work" != eval ] || {{ mkdir -p {samples}; echo a line >>{samples}/sums.jsonl; }}'
    for _ in range(5):
        assert "crash 1 of 3" in run_script("evaluate.sh", {"eval": 1}, ON_SRUN=further).stdout
    assert requeued(stubs) == 5


def test_a_mistake_is_not_requeued(run_script, stubs) -> None:
    assert run_script("evaluate.sh", {"eval": 2}).returncode == 2
    assert requeued(stubs) == 0


def test_every_rank_has_the_cores_that_the_job_asked_for(run_script, stubs) -> None:
    note = 'echo "${work:-other} $SRUN_CPUS_PER_TASK" >>"$STUBS/cores"'
    assert run_script(SLURM_CPUS_PER_TASK="12", ON_SRUN=note).returncode == 0
    steps = dict(line.split() for line in (stubs / "cores").read_text().splitlines())
    assert {"doctor", "train", "eval"} <= steps.keys() and set(steps.values()) == {"12"}


def test_a_missing_environment_is_named_before_anything_is_run(run_script, stubs) -> None:
    job = run_script(VENV="/no/such/environment")
    assert job.returncode == 2 and "no Python environment in /no/such/environment; set VENV to" in job.stdout
    assert not (stubs / "srun.log").exists()


def test_nothing_is_requeued_after_success(run_script, stubs) -> None:
    done = run_script()
    assert done.returncode == 0 and "done:" in done.stdout
    assert requeued(stubs) == 0


def test_a_wrong_benchmark_ends_the_job_before_anything_is_fetched(run_script, stubs) -> None:
    really = f'[ "$work" != --dry-run ] || [[ "$*" != *benchmarks* ]] || {REALLY}'
    job = run_script(BENCHMARKS="math500,math50", ON_SRUN=really)
    assert job.returncode == 2 and "unknown benchmark `math50`; choose one of aime24" in job.stdout
    assert " fetch " not in (stubs / "srun.log").read_text()


@pytest.mark.slow
def test_benchmarks_are_read_before_the_training(run_script, tmp_path) -> None:
    sums = tmp_path / "sums.yaml"
    sums.write_text("title: Sums\nreward: {function: boxed}\nmax_response_tokens: 64\nhub: {source: problems.jsonl}\n")
    config = str(write_tiny_run(tmp_path))
    really = f'[ "$work" != fetch ] || {REALLY}'
    job = run_script(CONFIG=config, BENCHMARKS=str(sums), ON_SRUN=really)
    assert job.returncode == 2 and "Traceback" not in job.stdout
    assert "no such file: problems.jsonl" in job.stdout and "training" not in job.stdout
    sums.write_text(sums.read_text().replace("problems.jsonl", str(tmp_path / "prompts.jsonl")))
    job = run_script(CONFIG=config, BENCHMARKS=str(sums), ON_SRUN=really)
    assert job.returncode == 0 and "; 40 prompts, 8 held-out, 40 sums" in job.stdout


@pytest.mark.parametrize("line", SUBMISSIONS)
def test_submissions_in_the_documents_do_what_they_say(line, stubs, tmp_path) -> None:
    """As written, by an `sbatch` that runs the script at once, as every task of an array would."""
    (tmp_path / "dsrl_qwen3_8b" / "hf" / "step_000348").mkdir(parents=True)  # what one of them evaluates
    environment = os.environ | {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "STUBS": str(stubs),
        "ON_SRUN": TRAINED,
        "OUTPUT_DIR": str(tmp_path),
        "VENV": sys.prefix,  # lines with a container say VENV= themselves
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node",
    }
    job = subprocess.run(
        ["bash", "-c", line],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert job.returncode == 0, job.stdout
    started = (stubs / "srun.log").read_text()
    wanted = (stubs / "wanted").read_text().split("\n")
    assert [value for value in wanted if value not in started] == []
    seeds = [f"seed={seed}" for seed in range(1, 4)] if "--array" in line else []
    assert job.stdout.count("done:") == max(len(seeds), 1)
    assert [seed for seed in seeds if seed not in started] == []
    if "dsrl_8b.sh" in line:
        assert f"--processes {16 if '--nodes=2' in line else 8}\n" in started
