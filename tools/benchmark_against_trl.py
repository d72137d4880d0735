#!/usr/bin/env python3
"""Seconds per GRPO step beside TRL's `GRPOTrainer`, on a CPU: same model, prompts, batch, reward and optimizer.

    python -m venv ~/trl && ~/trl/bin/pip install trl==1.16.0   # TRL needs its own environment
    python tools/benchmark_against_trl.py --trl-python ~/trl/bin/python --task tiny
    python tools/benchmark_against_trl.py --trl-python ~/trl/bin/python --task random

`tiny` is the tiny task with its base model (`bash examples/tiny_dsrl/run.sh` makes it), 32 prompts x 8 responses of up
to 64 tokens. `random` is a Qwen3 of 107 million parameters with random weights, 4 x 8 responses of 128 tokens; a
response is right if its first word has an even number, which the policy can learn. All runs are in memory at the same
time: with `random`, give one number of threads and processes per call (6 to 8 GB a run).

All runs take their steps in turns: one computes while the others are suspended. A step is measured from the moment a
run is resumed until it has recorded the step. Times are wall-clock: run it on a machine without other work. The rewards
show that both do the same work; sampling differs, so the curves are similar and not the same.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from trl_comparison_tasks import REPOSITORY, TASKS, write_configuration, write_problems, write_random_task

from megatron_dsrl.config.load import load_config

WARM_UP_STEPS = 2
START_SECONDS, STEP_SECONDS, POLL_SECONDS = 1200.0, 3600.0, 0.002
VERSIONS = "import trl, transformers, torch; print('TRL', trl.__version__, 'Transformers', transformers.__version__, "
VERSIONS += "'torch', torch.__version__)"


@dataclass
class Run:
    """A training of one of the two projects, suspended unless it takes a step."""

    name: str
    command: list[str]
    environment: dict[str, str]
    records: Path
    reward_key: str
    log: Path
    seconds: list[float] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    family: set[psutil.Process] = field(default_factory=set)

    def start(self) -> None:
        """Start, wait for the steps of the warm-up, and suspend."""
        with self.log.open("wb") as log:
            environment = os.environ | self.environment
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=log, cwd=REPOSITORY)
        self._wait_for(WARM_UP_STEPS, START_SECONDS)
        self._signal("suspend")

    def step(self) -> None:
        """Take and measure one step."""
        wanted, started = len(self.rewards()) + 1, time.perf_counter()
        self._signal("resume")
        self._wait_for(wanted, STEP_SECONDS)
        self.seconds.append(time.perf_counter() - started)
        self._signal("suspend")

    def rewards(self) -> list[float]:
        """Mean reward of every step so far."""
        if not self.records.exists():
            return []
        *lines, _ = self.records.read_text().split("\n")  # the last one is empty, or not written yet
        return [record[self.reward_key] for record in map(json.loads, lines) if self.reward_key in record]

    def end(self) -> None:
        """End the run with all its processes, including those whose parent has already ended."""
        if self.process is not None:
            self._signal("kill")
            self.process.wait()

    def _wait_for(self, steps: int, seconds: float) -> None:
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while len(self.rewards()) < steps:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{self.name} ended or took too long; its last lines:\n{self.log.read_text()[-3000:]}")
            time.sleep(POLL_SECONDS)

    def _signal(self, action: str) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                getattr(process, action)()

    def _processes(self) -> list[psutil.Process]:
        """The run's process and its descendants, including those that have outlived their parent."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            self.family.update([parent, *parent.children(recursive=True)])
        return [process for process in self.family if process.is_running()]


def runs(options: argparse.Namespace, folder: Path, config_file: Path, problems: Path) -> Iterator[Run]:
    """For every number of threads: TRL, and this project with these threads shared out among its processes."""
    task, model = TASKS[options.task], load_config(config_file, []).model.path
    for threads in options.threads:
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY / "tools")}
        settings = {
            "model": str(Path(REPOSITORY, model)),
            "dtype": options.dtype,
            "problems": str(problems),
            "records": str(folder / f"trl_{threads}.jsonl"),
            "output": str(folder / f"trl_{threads}"),
            "reward": task.reward,
            "prompts": task.prompts,
            "samples_per_prompt": task.samples_per_prompt,
            "micro_batch": options.trl_micro_batch or task.trl_micro_batch,
            "response_tokens": task.response_tokens,
            "learning_rate": task.learning_rate,
            "threads": threads,
            "steps": 10_000,
        }
        command = [options.trl_python, str(REPOSITORY / "tools/grpo_with_trl.py"), json.dumps(settings)]
        log = folder / f"trl_{threads}.log"
        yield Run(f"TRL, {threads} thread(s)", command, environment, Path(settings["records"]), "reward", log)
        environment |= {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tools'}", "CUDA_VISIBLE_DEVICES": ""}
        for processes in (count for count in options.processes or sorted({1, threads}) if threads % count == 0):
            name = f"dsrl_{processes}_x_{threads // processes}"
            command = [sys.executable, "-m", "megatron_dsrl.cli", "train", str(config_file), f"name={name}"]
            command += ["--processes", str(processes)] if processes > 1 else []
            yield Run(
                f"dsrl, {processes} process(es) x {threads // processes} thread(s)",
                command,
                environment | {"OMP_NUM_THREADS": str(threads // processes)},
                folder / "runs" / name / "metrics.jsonl",
                "reward/mean",
                folder / f"{name}.log",
            )


@contextmanager
def started(all_runs: Sequence[Run]) -> Iterator[None]:
    """Start them one after the other, and end them all, even after SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        for run in all_runs:
            run.start()
        yield
    finally:
        for run in all_runs:
            run.end()


def main() -> None:
    """Command line: trains with both, as often as there are thread counts, and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="Python of an environment with TRL")
    parser.add_argument("--task", choices=TASKS, default="tiny")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--processes", type=int, nargs="+", help="of this project's runs (default: one, and one per thread)"
    )
    parser.add_argument("--steps", type=int, default=8, help="that are measured, after two of warm-up")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--trl-micro-batch", type=int, help="samples of TRL's forward and backward passes")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="against-trl-") as name:
        folder, task = Path(name), TASKS[options.task]
        changes = write_random_task(folder) if options.task == "random" else {}
        config_file, problems = write_configuration(folder, task, options.dtype, changes), folder / "problems.jsonl"
        write_problems(config_file, problems)
        trl = subprocess.run([options.trl_python, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout
        ours = ", ".join(f"{package} {version(package)}" for package in ("megatron-core", "sglang", "torch"))
        console.print(f"{trl.strip()}; megatron-dsrl {version('megatron-dsrl')} with {ours}")
        all_runs = list(runs(options, folder, config_file, problems))
        with started(all_runs):
            for _ in range(options.steps):
                for run in all_runs:
                    run.step()
            report(all_runs, options, console)


def report(all_runs: Sequence[Run], options: argparse.Namespace, console: Console) -> None:
    """Medians, their ratio to TRL's with as many threads, and the rewards of all steps."""
    table = Table("", "s/step, median", "min - max", "of TRL's", "mean reward, first and last 4 steps", box=None)
    reference = 0.0
    for run in all_runs:
        median, rewards = statistics.median(run.seconds), run.rewards()
        reference = median if run.name.startswith("TRL") else reference
        spread = f"{min(run.seconds):.2f} - {max(run.seconds):.2f}"
        ends = f"{statistics.fmean(rewards[:4]):.3f}, {statistics.fmean(rewards[-4:]):.3f}"
        table.add_row(run.name, f"{median:.2f}", spread, f"{median / reference:.2f}", ends)
    console.print(f"task {options.task}, {options.dtype}, {options.steps} steps of each in turns")
    console.print(table)
    for run in all_runs:
        console.print(f"reward of {run.name}: " + " ".join(f"{reward:.2f}" for reward in run.rewards()))


if __name__ == "__main__":
    main()
