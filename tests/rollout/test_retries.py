"""Requests that fail while their engine is well: a real engine behind a proxy that fails on request."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from megatron_dsrl.observability.timeline import EngineCall
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.batch import BatchProgress, RolloutBatch, ignore
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.engines.generation import Completion
from megatron_dsrl.rollout.sample import SampleGroup, SamplingParameters
from megatron_dsrl.rollout.seeds import seeds_of_batch
from megatron_dsrl.rollout.unfinished import new_groups
from tests.support.engine import batch_request, dispatch, numbered_prompts
from tests.support.failing_proxy import FailingProxy, Failure

SAMPLES, RESPONSE_TOKENS = 2, 24
LONG_RESPONSE_TOKENS = 2000
"""More than four seconds, so that there is time to interrupt them on a busy machine."""
PROMPTS = numbered_prompts(2)


class Behind:
    """The shared engine, which is asked through a proxy."""

    def __init__(self, rollout: EngineRollout, rewards: RewardPool) -> None:
        self.engine = rollout.engine_addresses[0]
        self.ended: list[EngineCall] = []
        self._weight_version = rollout.weight_version
        self._rewards = rewards

    def sample(
        self,
        *failures: Failure,
        prompts: int = 1,
        tokens: int = RESPONSE_TOKENS,
        meanwhile: Callable[[FailingProxy], None] = ignore,
        **settings: float,
    ) -> tuple[list[SampleGroup], FailingProxy, int]:
        """The groups, what the proxy has seen, and how many calls were retried.

        Keyword arguments are those of `batch_request`.
        """
        chosen = PROMPTS[:prompts]
        seeds = seeds_of_batch(1, "test", chosen, SAMPLES)
        groups = new_groups(chosen, seeds)
        sampling = SamplingParameters(tokens, stop_token_ids=())
        settings = {"weight_version": self._weight_version, "request_attempts": 3} | settings
        batch = RolloutBatch(batch_request(groups, sampling, **settings), 1)
        with FailingProxy(self.engine.url, *failures) as proxy:
            threading.Thread(target=meanwhile, args=(proxy,)).start()
            engines, progress = [replace(self.engine, url=proxy.url)], BatchProgress(on_call=self.ended.append)
            lost = dispatch(batch, engines, self._rewards, progress)
        assert not lost, "the engine was well"
        return batch.finished_groups, proxy, batch.retries


@pytest.fixture
def behind(engine_rollout: EngineRollout, rewards: RewardPool) -> Behind:
    return Behind(engine_rollout, rewards)


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Attempts follow each other without a pause."""
    monkeypatch.setattr("megatron_dsrl.rollout.batch.FIRST_BACK_OFF_SECONDS", 0.01)


def tokens_of(groups: list[SampleGroup]) -> list[tuple[int, ...]]:
    return [sample.response_ids for group in groups for sample in group.samples]


def test_a_request_that_fails_is_retried_after_growing_pauses(behind, monkeypatch) -> None:
    monkeypatch.setattr("megatron_dsrl.rollout.batch.FIRST_BACK_OFF_SECONDS", 0.2)
    undisturbed, proxy, retries = behind.sample()
    assert (len(proxy.calls), retries) == (1, 0)
    assert len(proxy.calls[0].body["input_ids"]) == SAMPLES, "the samples of a prompt go together"
    behind.ended.clear()

    groups, proxy, retries = behind.sample("status 500", "status 500", request_attempts=3)

    assert tokens_of(groups) == tokens_of(undisturbed)
    assert [call.body for call in proxy.calls] == [proxy.calls[0].body] * 3 and retries == 2
    first, second = (later.at - earlier.at for earlier, later in pairwise(proxy.calls))
    assert first >= 0.2 and second >= 0.4
    assert [(call.attempt, call.prompts) for call in behind.ended] == [(n, (PROMPTS[0].index,)) for n in (1, 2, 3)]
    assert "status 500, out of order" in behind.ended[0].outcome and behind.ended[2].outcome == "done"


def test_a_request_that_keeps_failing_ends_with_its_prompt_and_attempts(behind, at_once) -> None:
    message = "(?s)status 500, out of order.*last attempt for prompt 100 .*attempts = 2.*otherwise healthy"
    with pytest.raises(EngineError, match=message):
        behind.sample(*["status 500"] * 5, request_attempts=2)
    assert [call.attempt for call in behind.ended] == [1, 2]


def test_a_request_that_the_engine_refuses_for_good_is_not_made_again(behind, at_once) -> None:
    with pytest.raises(EngineError, match="status 400, not like this"):
        behind.sample(*["status 400"] * 5, request_attempts=5)
    assert len(behind.ended) == 1


def test_other_prompts_do_not_wait_for_the_one_that_fails(behind, at_once) -> None:
    groups, proxy, retries = behind.sample("status 500", prompts=2)
    assert [group.prompt for group in groups] == PROMPTS
    assert (len(proxy.calls), retries) == (3, 1)
    assert [call.outcome for call in behind.ended].count("done") == 2


def test_a_connection_that_is_cut_and_an_answer_that_takes_too_long(behind, at_once) -> None:
    undisturbed, _, _ = behind.sample()
    behind.ended.clear()

    groups, _, retries = behind.sample("connection cut", "no answer", request_timeout_seconds=3.0, request_attempts=3)

    assert tokens_of(groups) == tokens_of(undisturbed) and retries == 2
    cut, late, done = (call.outcome for call in behind.ended)
    assert "is gone: /generate failed with ServerDisconnected" in cut
    assert "did not answer /generate within 3 s" in late and done == "done"


def test_the_step_limit_names_the_unfinished_prompts(behind) -> None:
    late = [rf"prompt {prompt.index} on http\S+ for \d+ s" for prompt in PROMPTS]
    message = r"step_timeout_seconds = 0\.5; not finished \(prompts by index\): " + ", ".join(late) + "$"
    with pytest.raises(EngineError, match=message):
        behind.sample("no answer", "no answer", prompts=2, step_timeout_seconds=0.5)
    assert [call.outcome for call in behind.ended] == ["cancelled", "cancelled"]


def test_what_the_engine_aborts_itself_continues_where_it_stopped(behind, at_once) -> None:
    undisturbed, _, _ = behind.sample(tokens=LONG_RESPONSE_TOKENS)
    behind.ended.clear()

    async def abort_once(proxy: FailingProxy) -> None:
        async with EngineClient(behind.engine, 30.0) as client:
            while len(proxy.calls) < 2 and not proxy.is_closed:
                await asyncio.sleep(0.3)
                if len(proxy.calls) == 1:
                    await client.abort_all()

    groups, proxy, retries = behind.sample(
        tokens=LONG_RESPONSE_TOKENS, meanwhile=lambda proxy: asyncio.run(abort_once(proxy))
    )

    assert tokens_of(groups) == tokens_of(undisturbed) and retries == 1
    first, second = proxy.calls
    kept = [
        len(longer) - len(prompt)
        for longer, prompt in zip(second.body["input_ids"], first.body["input_ids"], strict=True)
    ]
    assert all(0 < count < LONG_RESPONSE_TOKENS for count in kept), "what there was is not sampled again"
    assert [(call.outcome, call.tokens) for call in behind.ended] == [
        ("aborted", sum(kept)),
        ("done", SAMPLES * LONG_RESPONSE_TOKENS - sum(kept)),
    ]


def test_the_run_counts_retried_requests(engine_rollout, at_once, monkeypatch) -> None:
    generate, failures = EngineClient.generate, [EngineError("out of order")]

    async def fails_once(client: EngineClient, *arguments: Any) -> list[Completion]:
        if failures:
            raise failures.pop()
        return await generate(client, *arguments)

    monkeypatch.setattr(EngineClient, "generate", fails_once)
    before = engine_rollout.engine_metrics()["engine/retries"]
    engine_rollout.generate(PROMPTS[:1], SAMPLES, engine_rollout.training_sampling, "test")
    assert engine_rollout.engine_metrics()["engine/retries"] == before + 1
