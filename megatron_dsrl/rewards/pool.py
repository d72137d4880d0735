"""Rewards in worker processes with a hard time limit.

A verifier runs on text that a model wrote, so it may hang or crash. A worker that exceeds the time or memory limit or
dies is killed and replaced; its response scores 0 and the verdict is counted. Only plain data leaves a worker, so that
exceptions or results of unusual classes do no harm. If a signal killed the worker, or all workers are lost with their
fork server, the response may not be the cause, and it is judged once more. A verifier that fails on everything ends the
run.

Workers do not import torch.
"""

import logging
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from pebble import ProcessExpired, ProcessPool

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import die_with_parent
from megatron_dsrl.common.temporary_folder import require_temporary_folder
from megatron_dsrl.config.data import PlacedReward, RewardConfig
from megatron_dsrl.rewards import registry
from megatron_dsrl.rewards.score import Score, Verdict, score_of
from megatron_dsrl.rewards.workers import WorkerContext, end_of_worker, may_be_innocent, start_fork_server

logger = logging.getLogger(__name__)

_LOGGED_AT_FIRST = 5


@dataclass(frozen=True)
class Judgement:
    """The verifier's result for one response."""

    reward: float
    """Finite; 0 for the verdicts `timeout` and `error`."""

    verdict: Verdict


class RewardPool:
    """Judges responses in parallel. Close it, or use it as a context manager."""

    def __init__(
        self, config: RewardConfig, set_rewards: Mapping[str, PlacedReward] | None = None, section: str = "reward"
    ) -> None:
        """`config`, from `section` of the configuration, has the number of workers and their memory for all verifiers;
        `set_rewards` are those of prompt sets that have their own, by the set's name.

        Raises UserError, before any process is started, if a reward function does not exist, does not take the options
        or may take longer than its `timeout_seconds`, or the temporary folder cannot be used.
        """
        require_temporary_folder()
        self._config = config
        self._default = PlacedReward(section, config)
        self._set_rewards = dict(set_rewards or {})
        for place, one in (self._default, *self._set_rewards.values()):
            registry.check_reward(one, place)
        self._lock = threading.Lock()
        self._failures: Counter[str] = Counter()
        """Consecutive failures of each function since its last success, not counting timeouts."""
        self._logged = 0
        self._last_problem: dict[str, str] = {}
        """The last failure of each function."""
        self._context = WorkerContext()
        self._pool = self._new_pool()

    def submit(
        self, response: str, answer: str, other_answers: Sequence[str] = (), prompt: str = "", prompt_set: str = ""
    ) -> "Future[Judgement]":
        """Judge one response; returns at once. The future never raises.

        The highest reward over the answers counts. `prompt` is the rendered prompt, for verifiers that read it;
        `prompt_set` the name of its set, which may have its own verifier. Raises UserError if the verifier has failed
        on `reward.max_consecutive_errors` responses in a row.
        """
        section, reward = self._set_rewards.get(prompt_set, self._default)
        limit, failures = reward.max_consecutive_errors, self._failures[reward.function]
        if limit is not None and failures >= limit:
            raise UserError(
                f"{section}.function: {reward.function} has failed on {failures} responses in a row, the last "
                f"time with: {self._last_problem[reward.function]}. Fix it, or raise {section}.max_consecutive_errors "
                "(null: no limit)"
            )
        judgement: Future[Judgement] = Future()
        arguments = (reward.function, reward.options, response, (answer, *other_answers), prompt)

        def judge_again(first: "Future[Score]") -> None:
            if _may_be_innocent(first):
                logger.warning("reward %s: its worker was lost; calling it once more", reward.function)
                self._schedule(reward, arguments, settle)
            else:
                settle(first)

        def settle(task: "Future[Score]") -> None:
            judgement.set_result(self._judgement(reward, task, response))

        self._schedule(reward, arguments, judge_again)
        return judgement

    def close(self) -> None:
        """Stop all workers and drop unfinished work. May be called again."""
        self._context.close()
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _new_pool(self) -> ProcessPool:
        # Workers are forked from a small clean process: a replacement takes milliseconds, and inherits nothing from the
        # trainer (torch, its threads, its devices).
        context = self._context
        functions = [self._config.function, *(one.config.function for one in self._set_rewards.values())]
        context.set_forkserver_preload(
            [__name__, *(module for name in functions for module in registry.built_in_modules(name))]
        )
        start_fork_server()
        return ProcessPool(
            max_workers=self._config.workers,
            initializer=_start_worker,
            initargs=(functions, self._config.memory_megabytes),
            context=context,
        )

    def _schedule(
        self, reward: RewardConfig, arguments: tuple[Any, ...], done: Callable[["Future[Score]"], None]
    ) -> None:
        with self._lock:
            try:
                task = self._pool.schedule(_call, args=arguments, timeout=reward.timeout_seconds)
            except RuntimeError:  # the pool has broken since
                logger.warning("reward %s: all workers were lost; replacing them", reward.function)
                self._pool = self._new_pool()
                task = self._pool.schedule(_call, args=arguments, timeout=reward.timeout_seconds)
        task.add_done_callback(done)

    def _judgement(self, reward: RewardConfig, task: "Future[Score]", response: str) -> Judgement:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, TimeoutError):
            self._log(reward, f"exceeded its timeout_seconds = {reward.timeout_seconds:g}", response)
            return Judgement(0.0, "timeout")
        if error is not None or task.cancelled():
            problem = end_of_worker(error) if isinstance(error, ProcessExpired) else f"was lost: {error!r}"
        else:
            score = task.result()
            if score.problem is None:
                self._failures[reward.function] = 0
                if score.why_fallback is None:
                    return Judgement(score.reward, "ok")
                self._log(reward, f"used its fallback, because {score.why_fallback}", response)
                return Judgement(score.reward, "fallback")
            problem = score.problem
        self._failures[reward.function] += 1
        self._last_problem[reward.function] = problem
        self._log(reward, problem, response)
        return Judgement(0.0, "error")

    def _log(self, reward: RewardConfig, problem: str, response: str) -> None:
        """Log the first few failures, then ever fewer: a batch has thousands of responses."""
        self._logged += 1
        if self._logged <= _LOGGED_AT_FIRST or self._logged.bit_count() == 1:
            count = f" (failure {self._logged})" if self._logged > _LOGGED_AT_FIRST else ""
            logger.warning("reward %s%s %s on %r", reward.function, count, problem, response[-200:])


def _may_be_innocent(task: "Future[Score]") -> bool:
    """Whether something other than the response may be the reason for a lost worker."""
    error = None if task.cancelled() else task.exception()
    return may_be_innocent(error) if isinstance(error, ProcessExpired) else isinstance(error, BrokenProcessPool)


def _start_worker(functions: Sequence[str], memory_megabytes: int) -> None:
    die_with_parent(os.getppid())
    for function in functions:  # their imports must not count against the first response's time limit
        _worker_function(function)
    limit = memory_megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@cache
def _worker_function(name: str) -> registry.RewardFunction:
    return registry.reward_function(name)


def _call(name: str, options: dict[str, Any], response: str, answers: tuple[str, ...], prompt: str) -> Score:
    """The best score over the answers; a problem only if every answer has one."""
    function = _worker_function(name)
    context = {"prompt": prompt} if registry.takes_prompt(function) else {}
    scores = [score_of(partial(function, response, answer, **context | options)) for answer in answers]
    return max(scores, key=lambda score: (score.problem is None, score.reward))
