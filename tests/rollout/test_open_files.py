"""A low limit of open files: requests wait, or the user gets a message; no engine is ever blamed."""

import asyncio
import errno
import logging
import os
import resource
import subprocess
import sys

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout import open_files
from megatron_dsrl.rollout.batch import BatchProgress, RolloutBatch
from megatron_dsrl.rollout.dispatcher import Dispatcher, GroupJudge
from megatron_dsrl.rollout.engine_health import EngineStates
from megatron_dsrl.rollout.engines.generation import Completion
from megatron_dsrl.rollout.open_files import TooManyOpenFilesError
from megatron_dsrl.rollout.sample import SamplingParameters
from megatron_dsrl.rollout.unfinished import UnfinishedGroup
from tests.support.engine import batch_request, decode_as_numbers, numbered_prompts
from tests.support.tiny_run import REPOSITORY

ANSWER = Completion((5, 7), (-0.5, -0.5), "stop", ((1, 2),))


class Engine:
    """An engine that cannot be reached while more than `files` requests are in flight."""

    url = "http://engine"

    def __init__(self, files: int) -> None:
        self.files = files
        self.in_flight = self.most_in_flight = 0

    async def generate(self, requests, sampling, timeout_seconds) -> list[Completion]:
        if self.in_flight >= self.files:
            raise TooManyOpenFilesError(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.01)
        self.in_flight -= 1
        return [ANSWER for _ in requests]

    async def check_health(self, timeout_seconds) -> None:
        raise TooManyOpenFilesError(OSError(errno.ENFILE, os.strerror(errno.ENFILE)))


def sample(engine: Engine, prompts: int) -> tuple[RolloutBatch, dict[int, str]]:
    groups = [UnfinishedGroup.new(prompt, [number]) for number, prompt in enumerate(numbered_prompts(prompts))]
    sampling = SamplingParameters(8, stop_token_ids=(7,))
    checks = {"health_check_seconds": 0.01, "health_timeout_seconds": 0.02}
    request = batch_request(groups, sampling, weight_version=1, **checks)
    batch, states = RolloutBatch(request, 1), EngineStates()
    with RewardPool(RewardConfig(function="tests.support.reward_functions:response_length", workers=1)) as rewards:

        async def run() -> None:
            judge = GroupJudge(rewards, decode_as_numbers)
            await Dispatcher(batch, [engine], states, judge, BatchProgress()).run()

        asyncio.run(run())
    return batch, states.lost


def test_requests_wait_for_file_descriptors(monkeypatch, caplog) -> None:
    monkeypatch.setattr("megatron_dsrl.rollout.open_files.requests_at_a_time", lambda: 3)
    engine = Engine(files=100)
    with caplog.at_level(logging.WARNING, logger="megatron_dsrl.rollout.open_files"):
        batch, lost = sample(engine, prompts=20)
    assert (len(batch.finished_groups), lost, engine.most_in_flight) == (20, {}, 3)
    assert caplog.text.count("lets only 3 requests run at a time; raise it") == 1


def test_a_request_without_a_descriptor_is_retried_and_costs_no_attempt_and_no_engine(monkeypatch) -> None:
    monkeypatch.setattr("megatron_dsrl.rollout.dispatcher.FIRST_BACK_OFF_SECONDS", 0.01)
    engine = Engine(files=4)
    batch, lost = sample(engine, prompts=20)
    assert (len(batch.finished_groups), lost, batch.retries, engine.most_in_flight) == (20, {}, 0, 4)


def test_no_descriptor_at_all_is_an_error_that_names_the_limit(monkeypatch) -> None:
    monkeypatch.setattr("megatron_dsrl.rollout.dispatcher.FIRST_BACK_OFF_SECONDS", 0.01)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with pytest.raises(UserError, match=f"Too many open files: the limit of open files is {soft}.*ulimit -n"):
        sample(Engine(files=0), prompts=2)


LIMITED = """
import asyncio, socket
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.open_files import TooManyOpenFilesError, requests_at_a_time
try:
    requests_at_a_time()
except ValueError as error:
    print(error)
taken = []
async def ask() -> None:
    async with EngineClient(EngineAddress("http://127.0.0.1:9"), 5.0) as client:
        try:
            while True:
                taken.append(socket.socket())
        except OSError:
            pass
        try:
            await client.check_health(5.0)
        except TooManyOpenFilesError as error:
            print(error)
asyncio.run(ask())
"""


def test_a_real_limit_is_recognised_before_the_start_and_in_a_call() -> None:
    program = subprocess.run(
        ["prlimit", "--nofile=64:64", sys.executable, "-c", LIMITED],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    before, during = program.stdout.splitlines()
    assert before.startswith("the limit of open files (`ulimit -n`) is 64; ")
    assert during.startswith("Too many open files: the limit of open files is 64 for this process; raise it")


def test_the_limit_is_raised_as_far_as_allowed(monkeypatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(open_files.resource, "setrlimit", lambda kind, both: limits.append(both))
    room = open_files.requests_at_a_time()
    assert limits == [(1024, 4096), (4096, 4096)]
    assert 3000 < room < 4096 - open_files.RESERVED
