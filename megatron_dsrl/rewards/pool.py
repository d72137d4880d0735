"""Rewards in worker processes with a hard time limit.

A verifier runs on text that a model wrote: it may hang or crash on it. A worker that exceeds the limit or dies is
killed and replaced, its response scores 0, and the verdict is counted; so is one that needs more memory than it may
have. Where a signal killed the worker, which need not be the response's fault, the response is judged once more.
Workers do not import torch.
"""

import logging
import math
import os
import resource
import signal
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import TracebackType
from typing import Any, Literal

from pebble import ProcessExpired, ProcessPool

from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.process import die_with_parent
from megatron_dsrl.rewards.registry import RewardFunction, built_in_modules, check_options, reward_function

logger = logging.getLogger(__name__)

_SIGNALS_TO_STOP = {signal.SIGUSR1, signal.SIGTERM}


@dataclass(frozen=True)
class Judgement:
    """What the verifier said about one response."""

    reward: float
    """Finite; 0 unless the verdict is `ok`."""

    verdict: Literal["ok", "timeout", "error"]
    """`timeout`: the limit was exceeded. `error`: the function raised, died, or returned no finite number."""


class RewardPool:
    """Judges responses in parallel. Close it, or use it as a context manager."""

    def __init__(self, config: RewardConfig) -> None:
        """
        Raises:
            UserError: The reward function does not exist or does not take the options. No process was started then.
        """
        check_options(config.function, config.options)
        self._config = config
        # Workers are forked from a small clean process: a replacement costs milliseconds, and nothing of the trainer
        # (torch, its threads, its devices) is inherited.
        context = _WorkerContext()
        context.set_forkserver_preload([__name__, *built_in_modules(config.function)])
        _start_fork_server()
        self._pool = ProcessPool(
            max_workers=config.workers,
            initializer=_start_worker,
            initargs=(config.function, config.memory_megabytes),
            context=context,
        )

    def submit(self, response: str, answer: str) -> "Future[Judgement]":
        """Judge one response; returns at once. The future never raises."""
        judgement: Future[Judgement] = Future()

        def judge_again(first: "Future[Any]") -> None:
            if _was_killed(first):
                logger.warning("reward %s: its worker was killed; it is called once more", self._config.function)
                self._schedule(response, answer, settle)
            else:
                settle(first)

        def settle(task: "Future[Any]") -> None:
            judgement.set_result(self._judgement(task, response))

        self._schedule(response, answer, judge_again)
        return judgement

    def _schedule(self, response: str, answer: str, done: Callable[["Future[Any]"], None]) -> None:
        options = tuple(sorted(self._config.options.items()))
        task = self._pool.schedule(
            _call, args=(self._config.function, options, response, answer), timeout=self._config.timeout_seconds
        )
        task.add_done_callback(done)

    def close(self) -> None:
        """Stop all workers, unfinished work included. May be called again."""
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _judgement(self, task: "Future[Any]", response: str) -> Judgement:
        name = self._config.function
        if task.cancelled():
            return Judgement(0.0, "error")
        error = task.exception()
        if isinstance(error, TimeoutError):
            logger.warning("reward %s exceeded %g s on %r", name, self._config.timeout_seconds, response[-200:])
            return Judgement(0.0, "timeout")
        if error is not None:
            what = "died" if isinstance(error, ProcessExpired) else "raised"
            logger.warning("reward %s %s on %r: %r", name, what, response[-200:], error)
            return Judgement(0.0, "error")
        reward = task.result()
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            logger.warning("reward %s returned %r, not a finite number, on %r", name, reward, response[-200:])
            return Judgement(0.0, "error")
        return Judgement(float(reward), "ok")


def _was_killed(task: "Future[Any]") -> bool:
    error = None if task.cancelled() else task.exception()
    return isinstance(error, ProcessExpired) and (error.exitcode or 0) < 0


class _WorkerProcess(ForkServerProcess):
    """A worker, which does not hear SIGTERM."""

    def terminate(self) -> None:
        """How the pool ends it."""
        self.kill()


class _WorkerContext(ForkServerContext):
    Process = _WorkerProcess


def _start_fork_server() -> None:
    """Start the clean process, unless it runs, with the signals to stop blocked, also for the workers.

    SLURM may send them to all processes of a job. This one decides when to stop, and needs its workers until then; and
    a pool whose fork server is gone can neither be used nor closed.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_TO_STOP)
    try:
        resource_tracker.ensure_running()  # unblocks SIGTERM, which it ignores itself
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_TO_STOP)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker(function: str, memory_megabytes: int) -> None:
    die_with_parent(os.getppid())
    _worker_function(function)  # what it imports must not count against the first response's time
    limit = memory_megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@cache
def _worker_function(name: str) -> RewardFunction:
    return reward_function(name)


def _call(name: str, options: tuple[tuple[str, Any], ...], response: str, answer: str) -> Any:
    return _worker_function(name)(response, answer, **dict(options))
