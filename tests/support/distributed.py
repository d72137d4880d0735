"""Run a function in several real processes that form a torch.distributed world, as torchrun would start them."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

EXIT_SECONDS = 20
"""Limit for a process that has given its result to end."""


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120) -> list:
    """Call `function(*args)` in `world_size` new processes, with torchrun's environment variables set.

    Args:
        function: importable (defined at the top of a module); it starts and ends torch.distributed itself.
        args: picklable arguments.
        timeout_seconds: limit for all processes together.

    Returns:
        Each process's result in rank order; results must be picklable (tensors: use `.tolist()` or save them).

    Raises:
        AssertionError: with the traceback of the first process that failed, or when the time is over. No process is
            left behind in any case.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(sender, rank, world_size, port, function, args))
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    try:
        results = _collect(pipes, time.monotonic() + timeout_seconds)
        for process in processes:  # Megatron's checkpoint writers have children of their own, which end in order
            process.join(EXIT_SECONDS)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def start_one_process(function: Callable[..., Any], *args: Any) -> multiprocessing.process.BaseProcess:
    """Start `function(*args)` in a process that is a torch.distributed world of its own, to be killed by the caller."""
    context = multiprocessing.get_context("spawn")
    _, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_rank, args=(sender, 0, 1, _free_port(), function, args), daemon=True)
    process.start()
    return process


def _run_rank(sender: Connection, rank: int, world_size: int, port: int, function: Callable, args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        outcome = ("result", function(*args))
        pickle.dumps(outcome)
    except BaseException:  # the parent raises it again
        outcome = ("error", traceback.format_exc())
    sender.send(outcome)


def _collect(pipes: list[Connection], deadline: float) -> list:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        assert ready, f"processes {sorted(waiting.values())} did not finish in time"
        for pipe in ready:
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise AssertionError(f"process {waiting[pipe]} died") from None
            assert kind == "result", f"process {waiting[pipe]} failed:\n{value}"
            results[waiting[pipe]] = value
    return [results[rank] for rank in range(len(pipes))]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
