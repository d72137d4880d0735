"""A `dsrl train` command that is still running, to be disturbed."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.forked import ForkedProcess
from tests.support.tiny_run import MARK, REPOSITORY, launcher, processes_left_behind, start_dsrl

POLL_SECONDS = 0.005
LIMIT_SECONDS = 400.0


class RunningTraining:
    """The process, and what can be seen of it from outside: its run folder and its children."""

    def __init__(self, process: subprocess.Popen[str] | ForkedProcess, run: Path, output: Path) -> None:
        self.process = process
        self._run = run
        self._output = output

    def wait_until(self, what: Callable[[], bool]) -> None:
        """Poll at short intervals until a condition holds or the training has ended."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not what() and self.process.poll() is None:
            assert time.monotonic() < deadline, self.output
            time.sleep(POLL_SECONDS)

    def has_rollouts(self, step: int) -> bool:
        """The step is sampled: its update has begun."""
        return (self._run / "rollouts" / f"step_{step:06d}.jsonl").exists()

    def has_checkpoint(self, step: int) -> bool:
        """The step is finished: sampling for the next one has begun."""
        return (self._run / "checkpoints" / f"step_{step:06d}").exists()

    def ranks(self) -> list[psutil.Process]:
        """torchrun's processes, in the order of their ranks."""
        children = psutil.Process(self.process.pid).children()
        return sorted((p for p in children if "RANK" in p.environ()), key=lambda p: int(p.environ()["RANK"]))

    def engine_processes(self) -> list[psutil.Process]:
        """The SGLang servers and all processes that they started."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [p for child in children if _is_engine(child) for p in (child, *child.children(recursive=True))]

    def ended(self) -> int:
        """Wait for the end; returns the exit status. No process that it started may be left."""
        status = self.process.wait(LIMIT_SECONDS)
        left = processes_left_behind()
        assert left == [], left
        return status

    @property
    def output(self) -> str:
        return self._output.read_text()


@contextmanager
def running_training(*arguments: str, run: Path, processes: int = 1) -> Iterator[RunningTraining]:
    """Start `dsrl train`; it is killed at the end of the block if it still runs.

    Args:
        arguments: configuration file and overrides.
        run: its run folder.
        processes: more than one run under torchrun.
    """
    output = run.parent / f"{run.name}.output"
    with open(output, "a") as stream:
        if processes == 1:
            process = start_dsrl("train", *arguments, output=stream.fileno(), errors=stream.fileno())
        else:  # the real torchrun: by their environment `ranks` knows its processes, which a fork's does not tell
            process = subprocess.Popen(
                [*launcher(processes), "-m", "megatron_dsrl.cli", "train", *arguments],
                cwd=REPOSITORY,
                env=os.environ | {"OMP_NUM_THREADS": "1", MARK: str(os.getpid())},
                stdout=stream,
                stderr=subprocess.STDOUT,
                text=True,
            )
    try:
        yield RunningTraining(process, run, output)
    finally:
        process.kill()
        process.wait()


def _is_engine(process: psutil.Process) -> bool:
    try:
        return "megatron_dsrl.rollout.engines.server_main" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
