"""What a batch does with answers and failures, without engines."""

import time

import pytest

from megatron_dsrl.rollout.batch import FIRST_BACK_OFF_SECONDS, Call, RolloutBatch
from megatron_dsrl.rollout.engines.errors import EngineError, StaleWeightsError
from megatron_dsrl.rollout.engines.generation import Completion
from megatron_dsrl.rollout.sample import SamplingParameters
from megatron_dsrl.rollout.unfinished import UnfinishedGroup
from tests.support.engine import batch_request, numbered_prompts
from tests.support.scripted_engine import ScriptedEngine

VERSION = 3


def answer(*response_ids: int, reason: str = "stop", version: int = VERSION) -> Completion:
    return Completion(response_ids, (-0.5,) * len(response_ids), reason, ((version, len(response_ids)),))


@pytest.fixture
def batch() -> RolloutBatch:
    """Two prompts with two samples each, which an engine gets in one call."""
    groups = [UnfinishedGroup.new(prompt, [1, 2]) for prompt in numbered_prompts(2)]
    sampling = SamplingParameters(8, stop_token_ids=(7,))
    settings = {"weight_version": VERSION, "deterministic": True, "request_attempts": 3}
    batch = RolloutBatch(batch_request(groups, sampling, **settings), num_engines=1)
    batch.top_up()
    return batch


def add(batch: RolloutBatch, call: Call, *completions: Completion) -> None:
    for position, answers in batch.split(call, completions):
        batch.extend(position, answers)


def test_answers_go_to_the_responses_that_asked(batch) -> None:
    call = batch.waiting.popleft()
    assert batch.prompt_indices(call) == (100, 101) and len(batch.requests(call)) == 4
    add(batch, call, answer(5, 7), answer(6, reason="abort"), answer(7), answer(8, 7))
    assert [group.is_complete for group in batch.groups.values()] == [False, True] and not batch.is_answered(call)
    (request,) = batch.requests(call)
    assert request.token_ids == (*batch.groups[0].prompt.token_ids, 6) and request.max_new_tokens == 7
    add(batch, call, answer(7))
    assert batch.is_answered(call)
    assert [list(response.response_ids) for response in batch.groups[0].responses] == [[5, 7], [6, 7]]


def test_tokens_of_other_weights_are_refused(batch) -> None:
    with pytest.raises(StaleWeightsError, match=r"prompt 100 was generated with weight version \[2\], .* is 3"):
        batch.extend(0, [answer(7), answer(7, version=2)])
    batch.extend(0, [Completion((), (), "abort", ()), answer(7)])  # aborted before its first token


def test_while_weights_change_a_token_must_be_of_weights_since_its_request() -> None:
    versions = [range(3, 4)]
    groups = [UnfinishedGroup.new(prompt, [1, 2]) for prompt in numbered_prompts(1)]
    request = batch_request(groups, SamplingParameters(8, (7,)), versions=lambda: versions[0])
    batch = RolloutBatch(request, 1)
    batch.top_up()
    call = batch.waiting.popleft()
    batch.ask(call, ScriptedEngine(lambda request: (7,))).close()
    versions[0] = range(4, 6)  # version 5 is being loaded
    batch.extend(0, [answer(5, reason="abort", version=3), answer(7, version=5)], call.oldest_version)
    with pytest.raises(StaleWeightsError, match=r"version \[2\], the current one is 5, and 3 when it was requested"):
        batch.extend(0, [answer(7, version=2)], call.oldest_version)


def test_each_further_attempt_waits_longer_and_the_last_one_names_the_prompts(batch) -> None:
    call = batch.waiting.popleft()
    batch.extend(1, [answer(7), answer(7)])
    pauses = []
    for _ in range(2):
        batch.retry(call, EngineError("busy"))
        assert batch.waiting.popleft() is call and call.positions == (0,), "only what is missing is asked for again"
        pauses.append(call.not_before - time.monotonic())
    assert pauses == pytest.approx([FIRST_BACK_OFF_SECONDS, 2 * FIRST_BACK_OFF_SECONDS], abs=0.1)
    with pytest.raises(EngineError, match=r"(?s)busy.*last attempt for prompt 100 \(rollout.request_attempts = 3\)"):
        batch.retry(call, EngineError("busy"))
    assert batch.retries == 2


def test_a_call_of_a_lost_engine_is_made_at_once_and_costs_no_attempt(batch) -> None:
    call = batch.waiting.popleft()
    batch.waiting.append(Call((1,)))
    batch.put_back(call)
    assert batch.waiting[0] is call and call.not_before <= time.monotonic() and call.attempts == batch.retries == 0
