"""External SGLang servers: a real one in a separate process, with a key, started as its owner would."""

import asyncio
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.platform.engine import engine_environment
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.address import API_KEY_VARIABLE
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.external_engines import ExternalEngines
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest
from megatron_dsrl.rollout.engines.server import EngineServer
from megatron_dsrl.rollout.engines.server_arguments import server_arguments
from megatron_dsrl.rollout.engines.weight_broadcast import ServerLink, broadcast_weights
from megatron_dsrl.rollout.engines.weight_client import WeightClient
from megatron_dsrl.rollout.recording import read_groups, rollout_file
from megatron_dsrl.rollout.sample import SamplingParameters
from tests.support.compare_runs import records
from tests.support.engine import (
    STOP_TOKEN_ID,
    decode_as_numbers,
    numbered_prompts,
    tiny_run_config,
    transformers_log_probs,
    weights_checker,
)
from tests.support.tiny_model import make_tiny_qwen3
from tests.support.tiny_run import dsrl, write_tiny_run

KEY = "key-of-the-test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("external") / "model"
    make_tiny_qwen3(folder, tied=False, vocab_size=101)  # the sizes of some tensors are not multiples of 16 bytes
    return folder


@pytest.fixture(scope="module")
def server(folder) -> Iterator[EngineServer]:
    """As its owner starts it: with other weights than the run's, and a key."""
    arguments = server_arguments(tiny_run_config(folder), 0) | {"load_format": "dummy"}
    server = EngineServer(arguments, engine_environment(1), folder.parent / "server.log", 120.0, key=KEY)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def rollout(server, folder, tmp_path, monkeypatch) -> Iterator[EngineRollout]:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    config = tiny_run_config(folder, urls=[server.url], check_weights="always", update_timeout_seconds=10.0)
    rollout = EngineRollout(config, tmp_path, (STOP_TOKEN_ID,), decode_as_numbers)
    try:
        rollout.wait_until_ready()
        yield rollout
    finally:
        rollout.close()


def buckets_of(folder: Path) -> list[Bucket]:
    named = sorted(load_file(folder / "model.safetensors").items())
    return [named[start : start + 5] for start in range(0, len(named), 5)]


def test_samples_come_from_the_broadcast_weights(rollout, folder) -> None:
    policy = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    rollout.load_weights(lambda: buckets_of(folder), version=1)
    groups = rollout.generate(numbered_prompts(3), 2, rollout.training_sampling, "test")

    for group in groups:
        for sample in group.samples:
            reference = transformers_log_probs(policy, group.prompt.token_ids, sample.response_ids, 1.0)
            assert (reference - torch.tensor(sample.log_probs)).abs().max() < 1e-4
    assert sum(len(group.samples) for group in groups) == 6


def test_a_tensor_that_does_not_arrive_ends_the_run(rollout, folder) -> None:
    lost = "model.layers.1.mlp.down_proj.weight"
    incomplete = [[pair for pair in bucket if pair[0] != lost] for bucket in buckets_of(folder)]

    with pytest.raises(UserError, match=f"engine rank 0: {lost} of the engine was not sent"):
        rollout.load_weights(lambda: incomplete, version=2)
    rollout.load_weights(lambda: buckets_of(folder), version=2)  # the server itself is none the worse for it


def test_a_server_that_hangs_gets_the_weights_when_it_goes_on(server, folder, monkeypatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    engines = ExternalEngines(tiny_run_config(folder, urls=[server.url], update_timeout_seconds=2.0), initial_version=0)
    gathered = []

    def stream() -> Iterator[Bucket]:
        """The server is stopped while it has a bucket to load, for longer than the limit."""
        for number, bucket in enumerate(buckets_of(folder)):
            if not gathered and number == 1:
                os.killpg(server.process_id, signal.SIGSTOP)
                threading.Timer(4.0, os.killpg, [server.process_id, signal.SIGCONT]).start()
            yield bucket
        gathered.append(time.monotonic())

    try:
        engines.wait_until_ready()
        engines.load(stream, version=3)
    finally:
        engines.close()
    assert len(gathered) > 1 and engines.restarts == len(gathered) - 1, "drawn to the end even without a listener"


def test_what_an_earlier_run_has_left_is_ended(rollout, server, folder) -> None:
    async def begin_and_push() -> Completion:
        request = SampleRequest(tuple(range(20)), seed=0, max_new_tokens=450)
        async with EngineClient(server.address, timeout_seconds=60.0) as client:
            left = asyncio.create_task(client.generate([request], SamplingParameters(450, stop_token_ids=())))
            await asyncio.sleep(0.3)
            opened = asyncio.create_task(client.begin_weight_update())  # waits for the request
            await asyncio.to_thread(rollout.load_weights, lambda: buckets_of(folder), 5)
            await opened
            return (await left)[0]

    completion = asyncio.run(begin_and_push())

    assert completion.finish_reason == "abort" and len(completion.response_ids) < 450


def test_a_refusal_ends_the_broadcast(server, folder, monkeypatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    link = ServerLink(server.address, timeout_seconds=60.0)

    async def push_to_a_server_that_has_left() -> dict[str, str]:
        await link.connect()
        async with WeightClient(server.address, 60.0) as client:
            await client.leave(link.group_name)
        return await broadcast_weights([link], buckets_of(folder), version=4)

    begin = time.monotonic()
    problems = asyncio.run(push_to_a_server_that_has_left())

    assert " not in" in problems[server.url] and "Group dsrl-" in problems[server.url]
    assert time.monotonic() - begin < 30.0, "not the time limit of the broadcast"
    assert not link.is_connected


def test_a_broadcast_that_waits_for_the_server_does_not_block_other_calls(server, folder, monkeypatch) -> None:
    broadcast = dist.ProcessGroup.broadcast

    def blocking(group: dist.ProcessGroup, tensors: list[torch.Tensor], options: dist.BroadcastOptions) -> dist.Work:
        """Returns when the server takes part, as the first broadcast over NCCL does."""
        work = broadcast(group, tensors, options)
        while not work.is_completed():
            time.sleep(0.001)
        return work

    monkeypatch.setattr(dist.ProcessGroup, "broadcast", blocking)
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    link = ServerLink(server.address, timeout_seconds=10.0)

    async def push_over_a_blocking_group() -> dict[str, str]:
        await link.connect()
        problems = await broadcast_weights([link], buckets_of(folder), version=6)
        await link.leave()
        return problems

    assert asyncio.run(push_over_a_blocking_group()) == {}


@pytest.mark.parametrize("key", ["wrong", ""])
def test_a_server_that_refuses_the_key_is_named(key, rollout, server, folder, monkeypatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, key)
    config = tiny_run_config(folder, urls=[server.url], startup_timeout_seconds=0.1)

    with pytest.raises(UserError, match=f"no SGLang server was ready at {server.url}.*status 401.*{API_KEY_VARIABLE}"):
        ExternalEngines(config, initial_version=0).wait_until_ready()


def test_urls_are_checked(folder) -> None:
    for urls, problem in [
        (["localhost:3000"], "expected http://host:port, without a path"),
        (["http://a:1/v1"], "expected http://host:port, without a path"),
        (["http://user:secret@a:1"], "without a user name and password"),
        (["http://a:1", "http://a:1"], "names a server twice"),
    ]:
        with pytest.raises(ValidationError, match=problem):
            tiny_run_config(folder, urls=urls)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_processes_train_with_a_server_elsewhere(ranks, tmp_path, monkeypatch) -> None:
    config = write_tiny_run(tmp_path)
    servers_own = tiny_run_config(tmp_path / "model", tensor_parallel_size=ranks)
    arguments = server_arguments(servers_own, 0) | {"load_format": "dummy"}
    server = EngineServer(arguments, engine_environment(ranks), tmp_path / "server.log", 120.0, key=KEY)
    server.start()
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    try:
        overrides = [f"engine.urls=[{server.url}]", "engine.check_weights=always", "parallel.tensor_parallel_size=2"]
        result = dsrl("train", str(config), *overrides, processes=2, timeout_seconds=400)
        server.check_alive()
    finally:
        server.stop()

    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / "tiny"
    assert [record["step"] for record in records(run)] == [1, 2]
    assert records(run)[1]["mismatch/max_log_prob_gap"] < 1e-4  # step 1 trains in the pre-train space
    assert not (run / "engines").exists(), "the run has not started its own engines"
    assert KEY not in "".join(path.read_text() for path in run.glob("*.yaml")), "the key is not written down"


@pytest.mark.slow
def test_samples_are_drawn_ahead_and_a_run_that_goes_on_has_them(tmp_path) -> None:
    """Steps after the first train on samples of the weights before; so does the first one after an interruption."""
    config = write_tiny_run(tmp_path)
    server = EngineServer(
        server_arguments(tiny_run_config(tmp_path / "model"), 0) | {"load_format": "dummy"},
        engine_environment(1),
        tmp_path / "server.log",
        startup_timeout_seconds=300.0,
    )
    server.start()
    ahead = [f"engine.urls=[{server.url}]", "rollout.sample_ahead=true", "checkpoint.save_every_steps=2", "steps=4"]
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"

    def train(name: str) -> None:
        result = dsrl("train", str(config), f"name={name}", *ahead, timeout_seconds=400)
        assert result.returncode == 0, result.stderr

    try:
        train("whole")
        shutil.copytree(whole, parts)  # and now as if it had been killed after its second step
        shutil.rmtree(parts / "checkpoints" / "step_000004")
        shutil.rmtree(parts / "hf")
        train("parts")
    finally:
        server.stop()

    for run in (whole, parts):
        assert [r["step"] for r in records(run)] == [1, 2, 3, 4]
        assert [r.get("response/older_token_fraction", 0.0) for r in records(run)] == [0.0, 1.0, 1.0, 1.0]
        for step in (1, 2, 3, 4):
            groups = read_groups(rollout_file(run, step))
            assert {s.weight_version for group in groups for s in group.samples} == {max(1, step - 1)}
    for one, other in zip(records(whole), records(parts), strict=True):
        assert other["reward/mean"] == one["reward/mean"]
        assert other["policy/loss"] == pytest.approx(one["policy/loss"], rel=1e-5)


@pytest.mark.slow
def test_a_server_that_its_owner_restarts_gets_the_weights(folder, tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start_server() -> EngineServer:
        arguments = server_arguments(tiny_run_config(folder), 0) | {"load_format": "dummy"}
        server = EngineServer(arguments, engine_environment(1), tmp_path / "server.log", 120.0, port=port)
        server.start()
        return server

    first, second = start_server(), None
    config = tiny_run_config(folder, urls=[first.url], update_timeout_seconds=5.0)
    engines = ExternalEngines(config, initial_version=0)
    try:
        engines.wait_until_ready()
        engines.load(lambda: buckets_of(folder), version=1)
        before = weights_checker(first.address, "checksum")["per_engine_checksum"]
        first.stop()
        second = start_server()
        engines.load(lambda: buckets_of(folder), version=2)
        assert weights_checker(second.address, "checksum")["per_engine_checksum"] == before
        assert engines.restarts >= 1
    finally:
        engines.close()
        first.stop()
        if second is not None:
            second.stop()
