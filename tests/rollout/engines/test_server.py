"""Supervision of the engine's processes: every way to fail ends with a message and leaves nothing running."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.platform.engine import engine_environment
from megatron_dsrl.rollout.engines.client import EngineError
from megatron_dsrl.rollout.engines.credentials import API_KEY_VARIABLE, agree_on_key
from megatron_dsrl.rollout.engines.engine_group import server_arguments
from megatron_dsrl.rollout.engines.server import EngineServer
from megatron_dsrl.rollout.engines.weight_push import push_weights
from tests.support.engine import processes_of_group, tiny_run_config


@pytest.fixture
def make_server(tiny_model_folder: Path, tmp_path: Path):
    servers: list[EngineServer] = []

    def make(startup_timeout_seconds: float = 120.0, port: int | None = None, **extra_arguments) -> EngineServer:
        config = tiny_run_config(tiny_model_folder, extra_arguments=extra_arguments)
        server = EngineServer(
            server_arguments(config, engine=0),
            engine_environment(tensor_parallel_size=1),
            log_file=tmp_path / "engines" / "engine_0.log",
            startup_timeout_seconds=startup_timeout_seconds,
            port=port,
        )
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_a_port_in_use_is_named_before_anything_starts(make_server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = make_server(port=port)

        with pytest.raises(UserError, match=f"engine.port: port {port} .*Address already in use"):
            server.start()

    assert server.process_id is None


def test_an_engine_that_is_never_ready_is_stopped(make_server):
    server = make_server(startup_timeout_seconds=1.0)
    server.start()
    group = server.process_id

    with pytest.raises(UserError, match="not ready within engine.startup_timeout_seconds = 1"):
        server.wait_until_ready()

    assert processes_of_group(group) == []


def test_an_engine_that_ends_early_is_noticed_at_once_and_its_log_shown(make_server):
    server = make_server(no_such_argument=1)
    server.start()
    group = server.process_id

    with pytest.raises(UserError, match="(?s)exited with status 1.*engine_0.log:.*no_such_argument"):
        server.wait_until_ready()

    assert processes_of_group(group) == []


@pytest.mark.slow
def test_a_scheduler_that_dies_while_it_starts_ends_the_wait(make_server):
    server = make_server()
    server.start()
    group = server.process_id
    started = []
    assert wait_for(lambda: started.extend(schedulers_of(group)) or started, seconds=150)

    started[0].kill()

    with pytest.raises(UserError, match="exited with status 1"):
        server.wait_until_ready()
    assert processes_of_group(group) == []


def schedulers_of(group: int) -> list[psutil.Process]:
    """SGLang's scheduler processes, which name themselves once they load the model."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            if os.getpgid(process.pid) == group and "scheduler" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_a_key_is_asked_for_a_bad_bucket_is_an_error_and_a_dead_engine_is_noticed(make_server, monkeypatch, tmp_path):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what agree_on_key does ends with the test
    agree_on_key()
    server = make_server(log_level="debug")
    server.start()
    group = server.process_id
    server.wait_until_ready()
    log = tmp_path / "engines" / "engine_0.log"
    assert wait_for(lambda: "Freezing GC in Scheduler process" in log.read_text(), seconds=20)
    assert len(processes_of_group(group)) >= 3  # server, scheduler, detokenizer
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.url}/model_info")
    assert os.environ[API_KEY_VARIABLE] not in " ".join(psutil.Process(group).cmdline())
    buckets = iter([[("model.norm.weight", torch.zeros(3))]] + 3 * [[("model.norm.weight", torch.zeros(64))]])

    problem = push_weights(buckets, 1, server.url, group=None, timeout_seconds=20.0)

    assert "update_weights_from_tensor" in problem
    assert list(buckets) == [], "other ranks wait until every rank has drawn the last bucket"
    assert wait_for(lambda: not processes_of_group(group), seconds=20)
    with pytest.raises(UserError, match="(?s)exited with status.*engine_0.log"):
        # A process counts as ended when the last of its threads has, a moment after the first.
        wait_for(lambda: server.check_alive(), seconds=20)
    server.stop()  # again, with nothing left to do


OWNER = """
import sys, time
from pathlib import Path
from tests.support.engine import tiny_run_config
from megatron_dsrl.platform.engine import engine_environment
from megatron_dsrl.rollout.engines.engine_group import server_arguments
from megatron_dsrl.rollout.engines.server import EngineServer

server = EngineServer(
    server_arguments(tiny_run_config(Path(sys.argv[1])), 0), engine_environment(1), Path(sys.argv[2]), 120.0
)
server.start()
print(server.process_id, flush=True)
time.sleep(120)
"""


@pytest.mark.slow
def test_the_engine_dies_with_a_killed_owner(tiny_model_folder, tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tiny_model_folder), str(tmp_path / "engine.log")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )
    try:
        group = int(owner.stdout.readline())
        # Just started is the hard case: SGLang's own precaution is not in place yet.
        assert wait_for(lambda: len(processes_of_group(group)) >= 3, seconds=90)  # server, scheduler, detokenizer
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)

        assert wait_for(lambda: not processes_of_group(group), seconds=5)
    finally:
        owner.kill()
        owner.wait()


def test_refused_weights_are_an_error(engine_rollout):
    from megatron_dsrl.rollout.engines.client import EngineClient
    from megatron_dsrl.rollout.engines.weight_push import BucketMemory, flatten, serialise

    async def update_without_begin() -> None:
        async with EngineClient(engine_rollout._urls[0], timeout_seconds=20.0) as client:
            bucket = flatten([("model.norm.weight", torch.ones(64))], BucketMemory())
            await client.update_weights([serialise(bucket)])

    with pytest.raises(EngineError, match="refused /update_weights_from_tensor.*must run between"):
        asyncio.run(update_without_begin())
