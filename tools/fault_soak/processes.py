"""The processes of a run by what they do, found below the run's own launcher and nowhere else."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

import psutil

ENGINE = "megatron_dsrl.rollout.engines.server_main"
FORK_SERVER = "multiprocessing.forkserver"


def process_tree(root: int) -> list[psutil.Process]:
    """A process and all that it started, directly or not; without those that have ended."""
    try:
        process = psutil.Process(root)
        found = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [each for each in found if _command(each)]


def launcher(tree: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The process of the command itself, in a list; empty after its end."""
    return list(tree[:1])


def ranks(tree: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The trainer's processes in the order of their ranks; a run of one process is its own launcher."""
    numbered = {_rank(process): process for process in _children(tree, tree[:1])}
    numbered.pop(None, None)
    return [numbered[rank] for rank in sorted(numbered, key=lambda rank: rank or 0)] or launcher(tree)


def engines(tree: Sequence[psutil.Process]) -> list[psutil.Process]:
    """SGLang's servers."""
    return [process for process in _children(tree, ranks(tree)) if ENGINE in _command(process)]


def schedulers(tree: Sequence[psutil.Process]) -> list[psutil.Process]:
    """SGLang's processes that hold the model, one per engine rank."""
    return [process for process in _children(tree, engines(tree)) if "scheduler" in _command(process)]


def detokenizers(tree: Sequence[psutil.Process]) -> list[psutil.Process]:
    """SGLang's processes that turn tokens into text."""
    return [process for process in _children(tree, engines(tree)) if "detokenizer" in _command(process)]


def reward_fork_servers(tree: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes that reward workers are forked from."""
    return [process for process in _children(tree, ranks(tree)) if FORK_SERVER in _command(process)]


def reward_workers(tree: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes that run the verifier."""
    return _children(tree, reward_fork_servers(tree))


Value = TypeVar("Value")
Role = Callable[[Sequence[psutil.Process]], list[psutil.Process]]
"""Picks the processes with one task from the tree of a run."""


def reap(except_for: int) -> list[psutil.Process]:
    """Collect ended processes that have lost their parent; returns this process's living descendants.

    Args:
        except_for: a child that another caller waits for.
    """
    living = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
            elif process.pid != except_for and process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
    return living


def _children(tree: Sequence[psutil.Process], parents: Sequence[psutil.Process]) -> list[psutil.Process]:
    ids = {process.pid for process in parents}
    return [process for process in tree if _or_none(process.ppid) in ids]


def _rank(process: psutil.Process) -> int | None:
    rank = (_or_none(process.environ) or {}).get("RANK")
    return None if rank is None else int(rank)


def _command(process: psutil.Process) -> str:
    """Empty for a process that has ended."""
    return " ".join(_or_none(process.cmdline) or ())


def _or_none(read: Callable[[], Value]) -> Value | None:
    try:
        return read()
    except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
        return None


def names(processes: Sequence[psutil.Process]) -> Iterator[str]:
    """For messages: process ids and the beginnings of the commands."""
    return (f"{process.pid} ({_command(process)[:80]})" for process in processes)
