"""Supervision of the engine's processes: every way to fail ends with a message and leaves nothing running."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.platform.engine import engine_environment
from megatron_dsrl.rollout.engines.errors import EngineError, EngineStartError
from megatron_dsrl.rollout.engines.server import EngineServer
from megatron_dsrl.rollout.engines.server_arguments import server_arguments
from megatron_dsrl.rollout.engines.server_process import shared_memory_files
from megatron_dsrl.rollout.engines.supervised_server import SupervisedServer
from megatron_dsrl.rollout.engines.weight_push import push_weights
from tests.support.engine import processes_of_group, start_servers_as, tiny_run_config
from tests.support.waiting import wait_until

KEY = "key-of-the-test"


@pytest.fixture
def make_server(tiny_model_folder: Path, tmp_path: Path) -> Iterator[Callable[..., EngineServer]]:
    servers: list[EngineServer] = []

    def make(startup_timeout_seconds: float = 120.0, port: int | None = None, **extra_arguments) -> EngineServer:
        config = tiny_run_config(tiny_model_folder, extra_arguments=extra_arguments)
        server = EngineServer(
            server_arguments(config, engine=0),
            engine_environment(tensor_parallel_size=1),
            log_file=tmp_path / "engines" / "engine_0.log",
            startup_timeout_seconds=startup_timeout_seconds,
            port=port,
            key=KEY,
        )
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()


def test_a_port_in_use_is_named_before_anything_starts(make_server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = make_server(port=port)

        with pytest.raises(UserError, match=f"engine.port: port {port} .*Address already in use"):
            server.start()

    assert server.process_id is None


def test_an_engine_that_is_never_ready_is_stopped(make_server) -> None:
    server = make_server(startup_timeout_seconds=1.0)
    server.start()
    group = server.process_id

    with pytest.raises(EngineStartError, match="not ready within engine.startup_timeout_seconds = 1"):
        server.wait_until_ready()

    assert processes_of_group(group) == []


def test_an_engine_that_ends_early_is_noticed_at_once_and_its_log_shown(make_server) -> None:
    server = make_server(no_such_argument=1)
    server.start()
    group = server.process_id

    with pytest.raises(UserError, match="(?s)exited with status 1.*engine_0.log:.*no_such_argument"):
        server.wait_until_ready()

    assert processes_of_group(group) == []


@pytest.mark.slow
def test_a_scheduler_that_dies_while_it_starts_ends_the_wait(make_server) -> None:
    server = make_server()
    server.start()
    group = server.process_id
    wait_until(lambda: bool(schedulers_of(group)), seconds=150)

    schedulers_of(group)[0].kill()

    with pytest.raises(EngineStartError, match="was killed by SIGKILL, as from the kernel when memory runs out"):
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
def test_a_key_is_asked_for_a_bad_bucket_is_an_error_and_a_dead_engine_is_noticed(make_server, tmp_path) -> None:
    server = make_server(log_level="debug")
    server.start()
    group = server.process_id
    server.wait_until_ready()
    log = tmp_path / "engines" / "engine_0.log"
    wait_until(lambda: "Freezing GC in Scheduler process" in log.read_text(), seconds=20)
    assert len(processes_of_group(group)) >= 3  # server, scheduler, detokenizer
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.url}/model_info")
    assert KEY not in " ".join(psutil.Process(group).cmdline())
    assert listening_beyond_loopback(group) == []
    shared_memory = shared_memory_files(group)
    assert shared_memory
    buckets = iter([[("model.norm.weight", torch.zeros(3))]] + 3 * [[("model.norm.weight", torch.zeros(64))]])

    problem = push_weights(buckets, 1, server.address, group=None, timeout_seconds=20.0)

    assert "update_weights_from_tensor" in problem
    assert list(buckets) == [], "other ranks wait until every rank has drawn the last bucket"
    wait_until(lambda: not processes_of_group(group), seconds=20)
    with pytest.raises((UserError, EngineStartError), match="(?s)(exited with status|was killed).*engine_0.log"):
        # A process counts as ended when the last of its threads has, a moment after the first.
        wait_until(lambda: server.check_alive(), seconds=20)
    server.stop()  # again, with nothing left to do
    assert not any(file.exists() for file in shared_memory)


def listening_beyond_loopback(group: int) -> list[str]:
    """Addresses other than loopback on which a process of the group listens."""
    connections = [each for process in processes_of_group(group) for each in process.net_connections(kind="tcp")]
    return [
        f"{each.laddr.ip}:{each.laddr.port}"
        for each in connections
        if each.status == psutil.CONN_LISTEN and not each.laddr.ip.startswith("127.")
    ]


@pytest.fixture
def without_sglang(monkeypatch) -> None:
    """The server's process only sleeps: what matters is what happens before SGLang has opened its port."""
    start_servers_as("import time; time.sleep(60)", monkeypatch)


def test_a_port_that_another_program_has_taken_meanwhile_is_noticed_at_once(make_server, without_sglang) -> None:
    """Another server there, even with the right answers, is not mistaken for the engine."""
    server = make_server()
    server.start()
    port = int(server.url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port), backlog=8):
        with pytest.raises(EngineStartError, match=f"another program listens at http://127.0.0.1:{port}"):
            server.wait_until_ready()
    assert server.process_id is None


def test_a_lost_port_is_replaced_and_a_killed_server_is_started_again(make_server, without_sglang, monkeypatch) -> None:
    server = make_server()
    waits: list[str] = []

    def first_two_starts_fail() -> None:
        waits.append(server.url)
        if len(waits) == 1:
            with socket.create_server(("127.0.0.1", int(server.url.rpartition(":")[2]))):
                EngineServer.wait_until_ready(server)
        elif len(waits) == 2:
            os.kill(server.process_id, signal.SIGKILL)
            EngineServer.wait_until_ready(server)

    monkeypatch.setattr(server, "wait_until_ready", first_two_starts_fail)
    monkeypatch.setattr("megatron_dsrl.rollout.engines.supervised_server.time.sleep", lambda seconds: None)
    supervised = SupervisedServer(server, engine=0, max_restarts=5)
    server.start()

    supervised.wait_until_ready()

    assert supervised.restarts == 2
    assert waits[0] != waits[1] == waits[2]


def test_a_server_that_is_killed_again_and_again_is_not_a_users_mistake(
    make_server, without_sglang, monkeypatch
) -> None:
    server = make_server()
    start = server.start

    def start_and_kill() -> None:
        start()
        os.kill(server.process_id, signal.SIGKILL)

    monkeypatch.setattr(server, "start", start_and_kill)
    monkeypatch.setattr("megatron_dsrl.rollout.engines.supervised_server.time.sleep", lambda seconds: None)
    server.start()

    with pytest.raises(EngineError, match="(?s)engine.max_restarts = 2 restarts: .*killed by SIGKILL.*memory") as error:
        SupervisedServer(server, engine=0, max_restarts=2).wait_until_ready()
    assert not isinstance(error.value, UserError)


def test_a_failure_of_the_gpu_is_not_a_users_mistake(make_server, monkeypatch) -> None:
    start_servers_as("input(); raise SystemExit('torch.AcceleratorError: CUDA error: out of memory')", monkeypatch)
    server = make_server()
    server.start()
    with pytest.raises(EngineStartError, match="(?s)exited with status 1; .*AcceleratorError: CUDA error"):
        server.wait_until_ready()


def test_two_runs_with_the_same_fixed_port_do_not_race_for_it(make_server, without_sglang) -> None:
    """Neither server listens yet, but the second run is refused at once."""
    first = make_server()
    first.start()
    port = int(first.url.rpartition(":")[2])
    second = make_server(port=port)

    with pytest.raises(UserError, match=f"engine.port: port {port} .*another process is using it"):
        second.start()
    first.stop()
    second.start()


@pytest.mark.slow
def test_an_engine_that_loses_its_port_while_it_loads_ends_and_the_other_one_is_not_used(make_server) -> None:
    """The port is taken by a program that SO_REUSEADDR lets in, and given up again before anyone looks."""
    server = make_server()
    server.start()
    port = int(server.url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)):
        wait_until(server.has_ended, seconds=150)  # uvicorn cannot listen
    with pytest.raises(EngineStartError, match=f"another program listens at http://127.0.0.1:{port}"):
        server.check_alive()


OWNER = """
import sys, time
from pathlib import Path
from tests.support.engine import tiny_run_config
from megatron_dsrl.platform.engine import engine_environment
from megatron_dsrl.rollout.engines.server_arguments import server_arguments
from megatron_dsrl.rollout.engines.server import EngineServer

server = EngineServer(
    server_arguments(tiny_run_config(Path(sys.argv[1])), 0), engine_environment(1), Path(sys.argv[2]), 120.0
)
server.start()
print(server.process_id, flush=True)
time.sleep(120)
"""


@pytest.mark.slow
def test_the_engine_dies_with_a_killed_owner(tiny_model_folder, tmp_path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tiny_model_folder), str(tmp_path / "engine.log")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )
    try:
        group = int(owner.stdout.readline())
        # Just started is the hard case: SGLang's own precaution is not in place yet.
        wait_until(lambda: len(processes_of_group(group)) >= 3, seconds=90)  # server, scheduler, detokenizer
        owner.send_signal(signal.SIGKILL)
        owner.wait(10)

        wait_until(lambda: not processes_of_group(group), seconds=5)
    finally:
        owner.kill()
        owner.wait()


def test_refused_weights_are_an_error(engine_rollout) -> None:
    from megatron_dsrl.rollout.engines.client import EngineClient
    from megatron_dsrl.rollout.engines.flattened_bucket import BucketMemory, flatten, serialise

    async def update_without_begin() -> None:
        async with EngineClient(engine_rollout.engine_addresses[0], timeout_seconds=20.0) as client:
            bucket = flatten([("model.norm.weight", torch.ones(64))], BucketMemory())
            await client.update_weights([serialise(bucket)])

    with pytest.raises(EngineError, match="refused /update_weights_from_tensor.*must run between"):
        asyncio.run(update_without_begin())


def test_a_key_is_in_no_message(tmp_path) -> None:
    server = EngineServer({}, {}, tmp_path / "engine_0.log", 1.0, key=KEY)
    assert KEY not in repr(SupervisedServer(server, engine=0, max_restarts=0))
