"""Engines that die or hang at any moment: the samples are those of an undisturbed engine, or there is a clear error.

Sampling is deterministic here, so that a batch that is asked for again must come back with the same bits.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.platform.engine import engine_environment
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.batch import BatchProgress, RolloutBatch
from megatron_dsrl.rollout.custom_generation import CustomGeneration
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.engines.server import EngineServer
from megatron_dsrl.rollout.engines.server_arguments import server_arguments
from megatron_dsrl.rollout.engines.supervised_server import SupervisedServer
from megatron_dsrl.rollout.growing_response import GrowingResponse
from megatron_dsrl.rollout.sample import SampleGroup, SamplingParameters
from megatron_dsrl.rollout.seeds import seeds_of_batch
from megatron_dsrl.rollout.unfinished import new_groups
from tests.support.engine import (
    batch_request,
    decode_as_numbers,
    dispatch,
    numbered_prompts,
    server_process,
    started_rollout,
    tiny_run_config,
)

PROMPTS = [replace(prompt, token_ids=prompt.token_ids[:20]) for prompt in numbered_prompts(16)]
SAMPLES = 4
RESPONSE_TOKENS = 200
"""Long enough to be in the middle of them after DISTURB_SECONDS: more than a second for all."""
DISTURB_SECONDS = 0.3
HEALTH_TIMEOUT_SECONDS = 4.0


@pytest.fixture(scope="module")
def config(tiny_model_folder: Path) -> RunConfig:
    config = tiny_run_config(
        tiny_model_folder,
        health_check_seconds=0.5,
        health_timeout_seconds=HEALTH_TIMEOUT_SECONDS,
        startup_timeout_seconds=300.0,
        max_restarts=20,
    )
    deterministic = config.rollout.model_copy(update={"deterministic": True})
    return config.model_copy(update={"rollout": deterministic})


@pytest.fixture(scope="module")
def rollout(config, tmp_path_factory) -> Iterator[EngineRollout]:
    with started_rollout(config, tmp_path_factory.mktemp("run")) as rollout:
        yield rollout


@pytest.fixture(scope="module")
def policy(tiny_model_folder) -> Qwen3ForCausalLM:
    """Other weights than those in the folder, which a restarted engine has at first."""
    torch.manual_seed(5)
    model = Qwen3ForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def undisturbed(rollout, policy) -> list[SampleGroup]:
    rollout.load_weights(lambda: [list(policy.named_parameters())], 1)
    return sample(rollout, policy)


def sample(rollout: EngineRollout, policy: Qwen3ForCausalLM) -> list[SampleGroup]:
    """The batch of all tests, as the training loop samples it."""
    sampling = replace(rollout.training_sampling, max_response_tokens=RESPONSE_TOKENS, stop_token_ids=())
    version = rollout.weight_version

    def recover() -> None:
        rollout.load_weights(lambda: [list(policy.named_parameters())], version)

    groups = rollout.while_sampling(lambda: rollout.generate(PROMPTS, SAMPLES, sampling, "test"), recover)
    assert groups is not None
    return groups


def assert_same(groups: list[SampleGroup], expected: list[SampleGroup]) -> None:
    """Prompts, tokens, log-probs and rewards, none lost or duplicated. (Versions: some tests push once more.)"""
    for group, other in zip(groups, expected, strict=True):
        assert group.prompt == other.prompt
        for one, two in zip(group.samples, other.samples, strict=True):
            assert replace(one, weight_version=0) == replace(two, weight_version=0)


def engine_process(rollout: EngineRollout) -> int:
    return server_process(rollout.engine_addresses[0])


def restarts(rollout: EngineRollout) -> int:
    return rollout.engine_metrics()["engine/restarts"]


def schedulers(server: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(server).children(recursive=True) if "scheduler" in " ".join(p.cmdline())]


def kill(server: int) -> None:
    os.kill(server, signal.SIGKILL)


def kill_scheduler(server: int) -> None:
    for process in schedulers(server):
        process.kill()


def stop_server(server: int) -> None:
    """The server hangs and answers nothing; its scheduler keeps running."""
    os.kill(server, signal.SIGSTOP)


def stop_scheduler(server: int) -> None:
    """The scheduler hangs; the server in front of it still answers."""
    for process in schedulers(server):
        process.send_signal(signal.SIGSTOP)


@contextmanager
def soon(disturb: Callable[[int], None], server: int) -> Iterator[None]:
    """Disturb the engine a moment later."""
    timer = threading.Timer(DISTURB_SECONDS, disturb, [server])
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(kill, marks=pytest.mark.slow),
        stop_scheduler,
        pytest.param(stop_server, marks=pytest.mark.slow),
        pytest.param(kill_scheduler, marks=pytest.mark.slow),
    ],
)
def test_it_is_lost_while_it_generates(disturb, rollout, policy, undisturbed) -> None:
    before = restarts(rollout)
    with soon(disturb, engine_process(rollout)):
        assert_same(sample(rollout, policy), undisturbed)
    assert restarts(rollout) == before + 1


@pytest.mark.slow
def test_it_dies_while_idle_and_again_while_it_takes_weights(rollout, policy, undisturbed) -> None:
    """As during a training step, and in the middle of the push after it."""
    before = restarts(rollout)
    kill(engine_process(rollout))

    def buckets_with_a_kill() -> Iterator[Bucket]:
        named = list(policy.named_parameters())
        yield named[:4]
        if restarts(rollout) == before + 1:
            kill(engine_process(rollout))
        yield named[4:]

    rollout.load_weights(buckets_with_a_kill, rollout.weight_version + 1)

    assert restarts(rollout) == before + 2
    assert_same(sample(rollout, policy), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [stop_scheduler, stop_server])
def test_it_hangs_while_it_takes_weights(disturb, config, rollout, policy, undisturbed, caplog) -> None:
    """After `engine.update_timeout_seconds` it is replaced, and the new one gets all weights."""
    before = restarts(rollout)

    def buckets_with_a_hang() -> Iterator[Bucket]:
        named = list(policy.named_parameters())
        yield named[:4]
        if restarts(rollout) == before:
            disturb(engine_process(rollout))
        yield named[4:]

    rollout.load_weights(buckets_with_a_hang, rollout.weight_version + 1)

    assert restarts(rollout) == before + 1
    limit = config.engine.update_timeout_seconds
    assert f"did not answer /update_weights_from_tensor within {limit:g} s" in caplog.text
    assert_same(sample(rollout, policy), undisturbed)


def test_an_engine_that_keeps_dying_ends_the_run_with_its_log(rollout, policy, undisturbed, monkeypatch) -> None:
    monkeypatch.setattr(SupervisedServer, "may_restart", lambda self: False)
    kill(engine_process(rollout))
    with pytest.raises(EngineError, match="(?s)after engine.max_restarts = .*Last lines of .*engine_0.log"):
        rollout.load_weights(lambda: [list(policy.named_parameters())], 9)


async def write_in_turns(response: GrowingResponse) -> None:
    """Turns of the model with a token between them, until the response is full."""
    while (await response.sample(max_new_tokens=20)).token_ids and response.insert([50]):
        pass


BY_A_FUNCTION = CustomGeneration("write_in_turns", write_in_turns, list, decode_as_numbers)


@pytest.mark.slow
@pytest.mark.parametrize("generation", [None, BY_A_FUNCTION], ids=["engine alone", "turns of a function"])
def test_another_engine_takes_over(generation, config, tmp_path) -> None:
    """One of two engines dies while both generate: the batch does not wait for its restart."""
    servers = [
        EngineServer(server_arguments(config, number), engine_environment(1), tmp_path / f"{number}.log", 300.0)
        for number in range(2)
    ]
    with ExitStack() as resources:
        for server in servers:
            resources.callback(server.stop)
            server.start()
        rewards = resources.enter_context(RewardPool(config.reward))
        for server in servers:
            server.wait_until_ready()
        quiet, quiet_lost = sample_on(servers, rewards, generation)
        with soon(kill, servers[1].process_id):
            disturbed, lost = sample_on(servers, rewards, generation)

    assert (list(quiet_lost), list(lost)) == ([], [1])
    for group, other, prompt in zip(disturbed, quiet, PROMPTS, strict=True):
        assert group.prompt == other.prompt == prompt
        assert len(group.samples) == len(other.samples) == SAMPLES
        assert all(len(sample.response_ids) == RESPONSE_TOKENS for sample in (*group.samples, *other.samples))


def sample_on(
    servers: list[EngineServer], rewards: RewardPool, generation: CustomGeneration | None
) -> tuple[list[SampleGroup], dict[int, str]]:
    """The batch of all tests over several engines; its groups, and the engines that were lost."""
    seeds = seeds_of_batch(1, "test", PROMPTS, SAMPLES)
    groups = new_groups(PROMPTS, seeds)
    sampling = SamplingParameters(RESPONSE_TOKENS, stop_token_ids=())
    checks = {"health_check_seconds": 0.5, "health_timeout_seconds": 60.0}  # the death ends a connection
    request = batch_request(groups, sampling, step_timeout_seconds=100.0, generation=generation, **checks)
    batch = RolloutBatch(request, len(servers))
    judged: list[SampleGroup] = []
    progress = BatchProgress(on_group=lambda position, group: judged.append(group))
    lost = dispatch(batch, [server.address for server in servers], rewards, progress)
    assert sorted(group.prompt.index for group in judged) == [prompt.index for prompt in PROMPTS], "each is judged once"
    return batch.finished_groups, lost
