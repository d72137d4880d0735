"""The job scripts under a real SLURM of one node: preemption, crashes, mistakes, arrays of seeds.

Needs root and SLURM's daemons: `bash tools/local_slurm.sh install`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.slurm.test_job_script import SUBMISSIONS
from tests.support.tiny_run import MARK, REPOSITORY, write_tiny_run
from tests.support.waiting import wait_until

LIMIT_SECONDS = 600.0
ONE_RANK_WITHOUT_GPUS = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=2")
pytestmark = [
    pytest.mark.timeout(2 * LIMIT_SECONDS),
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("slurmctld") is None or os.geteuid() != 0, reason="needs root and SLURM's daemons"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Environment of a running SLURM."""
    folder = tmp_path_factory.mktemp("slurm")
    script = ["bash", str(REPOSITORY / "tools" / "local_slurm.sh")]
    subprocess.run([*script, "start", str(folder)], check=True, timeout=60)
    yield os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run([*script, "stop", str(folder)], check=True, timeout=60)


@pytest.fixture
def benchmark(tmp_path) -> dict[str, str]:
    """Variables of an evaluation of the tiny model on a benchmark of 40 problems with 8 samples each."""
    file = tmp_path / "sums.yaml"
    file.write_text(
        "title: Sums\nreward: {function: tests.support.reward_functions:even_length, workers: 1}\n"
        "system_prompt: null\nmax_prompt_tokens: 64\nsamples_per_prompt: 8\nmax_response_tokens: 48\n"
        f"hub: {{source: {tmp_path / 'prompts.jsonl'}}}\n"
    )
    return {
        "POLICY": str(tmp_path / "model"),
        "BENCHMARKS": str(file),
        "SAMPLES": "",
        "EVALUATION_OVERRIDES": "engine.max_total_tokens=8192 engine.max_outstanding_samples=16 model.dtype=float32",
    }


class Job:
    """A submitted script, by default slurm/tiny_cpu.sh; its run has four steps and a checkpoint after each."""

    def __init__(
        self,
        slurm: dict[str, str],
        folder: Path,
        *options: str,
        overrides: str = "",
        script: str = "tiny_cpu.sh",
        **variables: str,
    ) -> None:
        self._slurm = slurm
        self.runs = folder / "runs"
        variables |= {
            "CONFIG": str(write_tiny_run(folder)),
            "RUN_NAME": "tiny",
            "OUTPUT_DIR": str(self.runs),
            "OVERRIDES": f"steps=4 checkpoint.save_every_steps=1 {overrides}",
            "VENV": sys.prefix,
            "DSRL_ROOT": str(REPOSITORY),
            MARK: str(os.getpid()),
        }
        command = ["sbatch", "--parsable", f"--output={folder}/job-%j.log", *options, f"slurm/{script}"]
        submitted = subprocess.run(
            command, cwd=REPOSITORY, env=slurm | variables, check=True, capture_output=True, text=True, timeout=60
        )
        self.number = submitted.stdout.strip()

    def signal(self, number: int) -> None:
        """To the training, as SLURM does before it ends a job."""
        subprocess.run(["scancel", f"--signal={number}", self.number], env=self._slurm, check=True, timeout=60)

    def kill_rank(self, rank: int) -> bool:
        """Kill the process of this rank, if it is there."""
        victims = [p for p in psutil.process_iter() if is_rank(p, str(self.runs.parent), str(rank))]
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        return bool(victims)

    def states(self) -> set[str]:
        """SLURM's words for the states of the job, or of all tasks of its array."""
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", self.number],
            env=self._slurm, check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return {word.removeprefix("JobState=") for word in shown.stdout.split() if word.startswith("JobState=")}

    def is_over(self) -> bool:
        return not self.states() & {"PENDING", "RUNNING", "COMPLETING", "REQUEUED"}

    def ended(self) -> set[str]:
        """Wait for the end; the states then."""
        wait_until(self.is_over, LIMIT_SECONDS, self.log, pause_seconds=0.2)
        return self.states()

    def samples(self) -> list[str]:
        """Lines of the evaluation's samples."""
        file = self.runs / "tiny" / "evaluation" / "samples" / "sums.jsonl"
        return file.read_bytes().decode().split("\n")[1:-1] if file.exists() else []

    def wait_for_samples(self) -> list[str]:
        wait_until(lambda: bool(self.samples()) or self.is_over(), LIMIT_SECONDS, self.log, pause_seconds=0.2)
        assert self.samples(), self.log()
        return self.samples()

    def wait_for_checkpoint(self, step: int) -> None:
        folder = self.runs / "tiny" / "checkpoints" / f"step_{step:06d}"
        wait_until(lambda: folder.exists() or self.is_over(), LIMIT_SECONDS, self.log, pause_seconds=0.2)
        assert folder.exists(), self.log()

    def log(self, run: str = "tiny") -> str:
        """What all attempts wrote."""
        return "".join(file.read_text() for file in sorted((self.runs / run / "slurm").glob("*.log")))

    def steps(self, run: str = "tiny") -> list[int]:
        """Steps with a record."""
        lines = (self.runs / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]


def test_a_preempted_job_saves_requeues_itself_and_continues(slurm, tmp_path) -> None:
    job = Job(slurm, tmp_path)
    job.wait_for_checkpoint(1)
    job.signal(signal.SIGUSR1)
    assert job.ended() == {"COMPLETED"}, job.log()
    assert job.steps() == [1, 2, 3, 4]
    assert "stopped on request; the state is saved" in job.log() and "attempt 1, on" in job.log()
    assert (job.runs / "tiny" / "report.html").exists() and (job.runs / "megatron" / "model").is_dir()


def test_a_crashed_rank_is_requeued_and_continues(slurm, tmp_path) -> None:
    job = Job(slurm, tmp_path, "--ntasks-per-node=2", "--cpus-per-task=1")
    job.wait_for_checkpoint(1)
    assert job.kill_rank(1)
    assert job.ended() == {"COMPLETED"}, job.log()
    assert job.steps() == [1, 2, 3, 4]
    assert "crash 1 of 3 without a new checkpoint" in job.log()


def test_a_rank_that_always_dies_ends_the_job_after_three_crashes(slurm, tmp_path) -> None:
    job = Job(slurm, tmp_path, "--ntasks-per-node=2", "--cpus-per-task=1", STEPS="check_environment train")

    def killed_to_the_end() -> bool:
        job.kill_rank(1)
        return job.is_over()

    wait_until(killed_to_the_end, LIMIT_SECONDS, job.log, pause_seconds=0.2)
    assert job.states() == {"FAILED"}
    assert job.log().count("requeueing") == 2 and "crash 3 of 3 without a new checkpoint" in job.log()


def test_the_last_attempt_does_not_requeue(slurm, tmp_path) -> None:
    job = Job(slurm, tmp_path, MAX_ATTEMPTS="1")
    job.wait_for_checkpoint(1)
    job.signal(signal.SIGUSR1)
    assert job.ended() == {"FAILED"}
    assert "attempt 0 was the last of 1; submit the script again to continue" in job.log()
    assert "requeueing" not in job.log() and job.steps()[-1] < 4


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_preempted_evaluation_keeps_its_samples_and_continues(slurm, tmp_path, benchmark, number) -> None:
    job = Job(slurm, tmp_path, *ONE_RANK_WITHOUT_GPUS, script="evaluate.sh", **benchmark)
    before = job.wait_for_samples()
    job.signal(number)
    assert job.ended() == {"COMPLETED"}, job.log()
    assert "requeueing" in job.log() and "attempt 1, on" in job.log()
    assert job.samples()[: len(before)] == before
    results = json.loads((job.runs / "tiny" / "evaluation" / "results.json").read_text())
    assert results["benchmarks"]["sums"]["problems"] == 40


def test_a_preempted_conversion_is_repeated(slurm, tmp_path) -> None:
    job = Job(slurm, tmp_path, "--cpus-per-task=1", script="convert.sh")
    is_running = lambda: any(map(is_conversion, psutil.process_iter())) or job.is_over()  # noqa: E731
    wait_until(is_running, LIMIT_SECONDS, job.log, pause_seconds=0.2)
    job.signal(signal.SIGUSR1)
    assert job.ended() == {"COMPLETED"}, job.log()
    assert "stopped on request before this step was done" in job.log() and "attempt 1, on" in job.log()
    assert (job.runs / "megatron" / "model").is_dir()


def test_a_mistake_in_the_configuration_fails_the_job_with_its_message(slurm, tmp_path) -> None:
    job = Job(slurm, tmp_path, overrides="rollout.temperature=-1")
    assert job.ended() == {"FAILED"}
    assert "rollout.temperature" in job.log() and "requeueing" not in job.log()


def test_an_array_is_one_run_per_seed(slurm, tmp_path) -> None:
    job = Job(slurm, tmp_path, "--array=5-6", overrides="steps=1")
    assert job.ended() == {"COMPLETED"}, job.log("tiny_seed5") + job.log("tiny_seed6")
    for seed in (5, 6):
        assert job.steps(f"tiny_seed{seed}") == [1]
        assert f"seed: {seed}\n" in (job.runs / f"tiny_seed{seed}" / "config.yaml").read_text()


def test_conversion_and_evaluation_are_jobs_of_their_own(slurm, tmp_path) -> None:
    conversion = Job(slurm, tmp_path, "--cpus-per-task=1", script="convert.sh")
    assert conversion.ended() == {"COMPLETED"}, conversion.log()
    assert (conversion.runs / "megatron" / "model").is_dir()
    assert not (conversion.runs / "tiny" / "metrics.jsonl").exists()
    problems = tmp_path / "problems.yaml"
    problems.write_text(
        "title: Sums\nreward: {function: boxed, workers: 1}\nsystem_prompt: null\nsamples_per_prompt: 1\n"
        f"max_response_tokens: 8\nmax_prompt_tokens: 64\nfile: {{source: {tmp_path / 'prompts.jsonl'}}}\n"
    )
    steps = {"STEPS": "check_environment evaluate", "BENCHMARKS": str(problems), "SAMPLES": "1"}
    nothing = Job(slurm, tmp_path, **steps)
    assert nothing.ended() == {"FAILED"} and "train first, or set POLICY" in nothing.log()


@pytest.mark.parametrize("line", SUBMISSIONS)
def test_submissions_in_the_documents_ask_for_what_a_cluster_has(slurm, line) -> None:
    """Nodes of 8 GPUs, which are made up here: SLURM says where the job would run, and does not run it."""
    tried = subprocess.run(
        ["bash", "-c", line.replace("sbatch ", "sbatch --test-only --partition=gpu ")],
        cwd=REPOSITORY, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60,
    )  # fmt: skip
    assert tried.returncode == 0, tried.stdout
    assert f"on nodes {'gpu[1-2]' if '--nodes=2' in line else 'gpu1'} in partition gpu" in tried.stdout


def is_rank(process: psutil.Process, folder: str, rank: str) -> bool:
    """A `dsrl train` process of this rank on a configuration in the folder."""
    try:
        command = process.cmdline()
        return "train" in command and any(folder in word for word in command) and process.environ().get("RANK") == rank
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def is_conversion(process: psutil.Process) -> bool:
    """The process of `dsrl convert hf-to-megatron` itself, not srun's."""
    try:
        command = process.cmdline()
        mine = process.environ().get(MARK) == str(os.getpid())
        return "hf-to-megatron" in command and "python" in command[0] and mine
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
