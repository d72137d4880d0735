"""External SGLang servers: a real one in a separate process, with a key, started as its owner would."""

import asyncio
import os
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
from megatron_dsrl.rollout.recording import read_groups, rollout_file
from megatron_dsrl.rollout.sample import Sample, SamplingParameters
from megatron_dsrl.rollout.unfinished import CarryOver
from tests.support.compare_runs import records
from tests.support.engine import (
    numbered_prompts,
    started_rollout,
    tiny_run_config,
    transformers_log_probs,
    weights_checker,
)
from tests.support.tiny_model import LONG_CONTEXT_TOKENS, make_tiny_qwen3
from tests.support.tiny_run import copy_until, dsrl, write_tiny_run

KEY = "key-of-the-test"
LONG_RESPONSE_TOKENS = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("external") / "model"
    # The sizes of some tensors are not multiples of 16 bytes.
    make_tiny_qwen3(folder, tied=False, vocab_size=101, context_tokens=LONG_CONTEXT_TOKENS)
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
    with started_rollout(config, tmp_path) as rollout:
        yield rollout


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


def test_new_weights_take_over_in_the_middle_of_responses(rollout, server, folder, tmp_path) -> None:
    """Every token has the log-prob under the weights that its version names, given all tokens before it."""
    policies = {1: Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()}
    policies[2] = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in policies[2].parameters():
            parameter.mul_(1.05)
    policies[2].save_pretrained(tmp_path / "changed")
    requests = [
        [SampleRequest(tuple(range(10 + start, 30 + start)), seed=start + each, max_new_tokens=1000) for each in (0, 1)]
        for start in (0, 5, 9)
    ]

    async def push_beside_generation() -> list[list[Completion]]:
        async with EngineClient(server.address, timeout_seconds=60.0) as client:
            sampling = SamplingParameters(1000, stop_token_ids=())
            running = [asyncio.create_task(client.generate(each, sampling)) for each in requests]
            await asyncio.sleep(0.3)
            await asyncio.to_thread(rollout.load_weights, lambda: buckets_of(tmp_path / "changed"), 2)
            return await asyncio.gather(*running)

    rollout.load_weights(lambda: buckets_of(folder), version=1)
    completions = asyncio.run(push_beside_generation())

    spans = [each.weight_versions for group in completions for each in group]
    assert {tuple(version for version, _ in each) for each in spans} == {(1, 2)}, spans
    for group, answers in zip(requests, completions, strict=True):
        for request, answer in zip(group, answers, strict=True):
            first = answer.weight_versions[0][1]
            for version, tokens in ((1, slice(first)), (2, slice(first, None))):
                reference = transformers_log_probs(policies[version], request.token_ids, answer.response_ids, 1.0)
                assert (reference - torch.tensor(answer.log_probs))[tokens].abs().max() < 1e-4


def test_a_tensor_that_does_not_arrive_ends_the_run(rollout, folder) -> None:
    lost = "model.layers.1.mlp.down_proj.weight"
    incomplete = [[pair for pair in bucket if pair[0] != lost] for bucket in buckets_of(folder)]

    with pytest.raises(UserError, match=f"engine rank 0: {lost} of the engine was not sent"):
        rollout.load_weights(lambda: incomplete, version=2)
    rollout.load_weights(lambda: buckets_of(folder), version=2)  # the server itself is unharmed


def test_a_server_with_digests_of_more_ranks_than_it_has_is_named(rollout, server, folder, monkeypatch) -> None:
    digests = ServerLink.digests

    async def twice(link: ServerLink) -> list[dict[str, str]]:
        return 2 * await digests(link)

    monkeypatch.setattr(ServerLink, "digests", twice)
    message = f"{server.url} does not hold .*\n.*digests of 2 ranks, but 1 rank got weights"
    with pytest.raises(UserError, match=message):
        rollout.load_weights(lambda: buckets_of(folder), version=1)


def test_a_server_that_hangs_gets_the_weights_when_it_continues(server, folder, monkeypatch) -> None:
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


def test_what_an_earlier_run_left_running_is_ended(rollout, server, folder) -> None:
    async def begin_and_push() -> Completion:
        request = SampleRequest(tuple(range(20)), seed=0, max_new_tokens=LONG_RESPONSE_TOKENS)
        sampling = SamplingParameters(LONG_RESPONSE_TOKENS, stop_token_ids=())
        async with EngineClient(server.address, timeout_seconds=60.0) as client:
            left = asyncio.create_task(client.generate([request], sampling))
            await asyncio.sleep(0.3)
            opened = asyncio.create_task(client.begin_weight_update())  # waits for the request
            await asyncio.to_thread(rollout.load_weights, lambda: buckets_of(folder), 5)
            await opened
            return (await left)[0]

    completion = asyncio.run(begin_and_push())

    assert completion.finish_reason == "abort" and len(completion.response_ids) < LONG_RESPONSE_TOKENS


def test_a_refusal_ends_the_broadcast(server, folder, monkeypatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    link = ServerLink(server.address, timeout_seconds=60.0)

    async def push_to_a_server_that_has_left() -> dict[str, str]:
        await link.connect()
        async with EngineClient(server.address, 60.0) as client:
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
def test_an_asynchronous_run_keeps_its_bound_and_continues_with_what_it_had(tmp_path) -> None:
    """Engines sample beside the trainer, weights change in the middle of responses, and no token is ever too old."""
    config = write_tiny_run(tmp_path)
    server = EngineServer(
        server_arguments(tiny_run_config(tmp_path / "model"), 0) | {"load_format": "dummy"},
        engine_environment(1),
        tmp_path / "server.log",
        startup_timeout_seconds=300.0,
    )
    server.start()
    overrides = [f"engine.urls=[{server.url}]", "rollout.max_staleness=2", "checkpoint.save_every_steps=3", "steps=6"]
    whole = tmp_path / "runs" / "whole"

    def train(name: str) -> None:
        result = dsrl("train", str(config), f"name={name}", *overrides, timeout_seconds=400)
        assert result.returncode == 0, result.stderr

    try:
        train("whole")
        parts = copy_until(whole, 3, "parts")
        left = CarryOver.read_from(parts / "checkpoints" / "step_000003" / "rollout")
        train("parts")
        server.check_alive()
    finally:
        server.stop()

    waiting = [*left.finished, *left.unfinished]
    assert len(waiting) == 8 * 2 and all(group.num_tokens == 0 for group in left.unfinished)
    for run in (whole, parts):
        assert [record["step"] for record in records(run)] == [1, 2, 3, 4, 5, 6]
        ages = [[step - sample.oldest_version for sample in samples_of(run, step)] for step in range(1, 7)]
        assert all(0 <= age <= min(2, step - 1) for step, of_step in enumerate(ages, 1) for age in of_step)
        for record, of_step in zip(records(run), ages, strict=True):
            assert record["asynchronous/max_staleness"] == max(of_step)
            assert record["asynchronous/mean_staleness"] == pytest.approx(sum(of_step) / len(of_step))
            assert 0 <= record["engine/idle_fraction"] <= 1
        assert max(max(of_step) for of_step in ages) == 2, "engines were ahead"
        prompts = [group.prompt.index for step in range(1, 6) for group in read_groups(rollout_file(run, step))]
        assert sorted(prompts) == list(range(40)), "five steps of eight prompts are one epoch: none lost, none twice"
    trained = [group.prompt.index for step in (4, 5) for group in read_groups(rollout_file(parts, step))]
    assert sorted(trained) == sorted(group.prompt.index for group in waiting)
    assert "policy/importance_weight" not in records(whole)[-1], "the loss's ratio corrects for older weights"


def samples_of(run: Path, step: int) -> list[Sample]:
    return [sample for group in read_groups(rollout_file(run, step)) for sample in group.samples]


@pytest.mark.slow
def test_a_server_that_its_owner_restarts_gets_the_weights(folder, tmp_path, caplog) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start_server() -> EngineServer:
        arguments = server_arguments(tiny_run_config(folder), 0) | {"load_format": "dummy"}
        server = EngineServer(arguments, engine_environment(1), tmp_path / "server.log", 120.0, port=port)
        server.start()
        return server

    first, second = start_server(), None
    url = first.url
    engines = ExternalEngines(tiny_run_config(folder, urls=[url], update_timeout_seconds=5.0), initial_version=0)
    try:
        engines.wait_until_ready()
        engines.load(lambda: buckets_of(folder), version=1)
        before = weights_checker(first.address, "checksum")["per_engine_checksum"]
        first.stop()
        second = start_server()
        engines.load(lambda: buckets_of(folder), version=2)
        assert weights_checker(second.address, "checksum")["per_engine_checksum"] == before
        assert engines.restarts >= 1
        assert f"waiting for {url}, at most " in caplog.text and f"{url} answers again" in caplog.text
    finally:
        engines.close()
        first.stop()
        if second is not None:
            second.stop()
