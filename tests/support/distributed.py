"""Run a function in several real processes that form a torch.distributed world, as torchrun would start them."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from megatron_dsrl.common.held_port import HeldPort
from tests.support.forked import ForkedProcess, fork


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120,
    prepare: str | None = None,
) -> list:
    """Call `function(*args)` in `world_size` new processes, with torchrun's environment variables set.

    Args:
        function: importable (defined at the top of a module); it starts and ends torch.distributed itself.
        args: picklable arguments.
        timeout_seconds: limit for all processes together.
        prepare: see `tests.support.forked.fork`.

    Returns:
        Each process's result in rank order; results must be picklable (tensors: use `.tolist()` or save them).

    Raises:
        AssertionError: with the traceback of the first process that failed, or at the time limit. No process is ever
            left behind.
    """
    port = HeldPort("127.0.0.1", None)
    processes: list[ForkedProcess] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        outcomes = [Path(folder, str(rank)) for rank in range(world_size)]
        try:
            for rank, outcome in enumerate(outcomes):
                processes.append(_start_rank(rank, world_size, port.number, outcome, function, args, prepare))
            return _collect(processes, outcomes, time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            port.close()


def start_one_process(function: Callable[..., Any], *args: Any) -> ForkedProcess:
    """Start `function(*args)` in a process that is a separate torch.distributed world, to be killed by the caller."""
    return _start_rank(0, 1, HeldPort("127.0.0.1", None).number, Path(os.devnull), function, args)


def _start_rank(
    rank: int,
    world_size: int,
    port: int,
    outcome: Path,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    prepare: str | None = None,
) -> ForkedProcess:
    torchrun = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return fork(_run_rank, outcome, function, args, environment=os.environ | torchrun, prepare=prepare)


def _run_rank(outcome: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Write the function's result or its error into a file."""
    try:
        content = pickle.dumps(("result", function(*args)))
    except BaseException:  # the parent raises it again
        content = pickle.dumps(("error", traceback.format_exc()))
    outcome.write_bytes(content)


def _collect(processes: list[ForkedProcess], outcomes: list[Path], deadline: float) -> list:
    """Wait until all processes have ended; returns their results."""
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        waiting = {process.status: rank for rank, process in enumerate(processes) if rank not in results}
        ended = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        assert ended, f"processes {sorted(waiting.values())} did not finish in time"
        for rank in (waiting[status] for status in ended):
            assert outcomes[rank].exists(), f"process {rank} died with status {processes[rank].poll()}"
            kind, value = pickle.loads(outcomes[rank].read_bytes())
            assert kind == "result", f"process {rank} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(processes))]
