"""Responses that a function writes together with the model: from the dispatcher to what the trainer scores."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_dsrl.algorithms.experience import build_experience
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.batch import BatchProgress, RolloutBatch
from megatron_dsrl.rollout.custom_generation import CustomGeneration, custom_generation
from megatron_dsrl.rollout.dispatcher import Dispatcher, GroupJudge
from megatron_dsrl.rollout.engine_health import EngineStates
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.errors import EngineError, StaleWeightsError
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest
from megatron_dsrl.rollout.growing_response import GrowingResponse
from megatron_dsrl.rollout.recording import read_groups, write_groups
from megatron_dsrl.rollout.rollout import responses_of
from megatron_dsrl.rollout.sample import Sample, SampleGroup, SamplingParameters
from megatron_dsrl.rollout.seeds import turn_seed
from megatron_dsrl.rollout.unfinished import UnfinishedGroup
from megatron_dsrl.run.rollout_metrics import entropy_metrics, generation_metrics
from tests.support.engine import batch_request, decode_as_numbers, dispatch, numbered_prompts, transformers_log_probs
from tests.support.scripted_engine import Answer, ScriptedEngine

(PROMPT,) = numbered_prompts(1)
END, ASK = 7, 8
SAMPLING = SamplingParameters(max_response_tokens=8, stop_token_ids=(END,))
SEEDS = (1000, 2000)


async def ask_once(response: GrowingResponse, result: str = "50 51") -> None:
    """Two turns of the model with a result between them."""
    await response.sample(stop_token_ids=[ASK])
    response.insert(result)
    await response.sample()


class AskOften:
    """Set up once for all responses."""

    def __init__(self, times: int) -> None:
        self.times = times

    async def __call__(self, response: GrowingResponse) -> None:
        for _ in range(self.times):
            await ask_once(response)


async def engine_alone(response: GrowingResponse) -> None:
    await response.sample()


async def only_inserts(response: GrowingResponse) -> None:
    response.insert([1, 2])


async def swallows_errors(response: GrowingResponse) -> None:
    """A turn that works, then one whose failure the function does not let through."""
    await response.sample(stop_token_ids=[ASK])
    try:
        await response.sample()
    except Exception:
        response.insert([60])


async def defective(response: GrowingResponse) -> None:
    await response.sample()
    raise KeyError("no such tool")


def generation(function: Callable[..., Any], **options: Any) -> CustomGeneration:
    """The function, for text that is token ids."""
    bound = partial(function, **options)
    return CustomGeneration(
        function.__name__, bound, lambda text: [int(word) for word in text.split()], decode_as_numbers
    )


def two_turns(request: SampleRequest) -> Answer:
    """10 and a call; after the result 20, 21 and the end."""
    if len(request.token_ids) == len(PROMPT.token_ids):
        return (10, ASK, 99)
    return (20, 21, END)


def sample(
    rewards: RewardPool, function: Callable[..., Any], *engines: ScriptedEngine, tokens: int = 8, **settings: Any
) -> tuple[SampleGroup, dict[int, str]]:
    """A group of two samples, and the engines lost."""
    request = batch_request(
        [UnfinishedGroup.new(PROMPT, SEEDS)],
        replace(SAMPLING, max_response_tokens=tokens),
        generation=generation(function),
        **settings,
    )
    batch, states = RolloutBatch(request, len(engines)), EngineStates()
    asyncio.run(Dispatcher(batch, engines, states, GroupJudge(rewards, decode_as_numbers), BatchProgress()).run())
    return batch.finished_groups[0], states.lost


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Attempts follow each other without a pause."""
    monkeypatch.setattr("megatron_dsrl.rollout.batch.FIRST_BACK_OFF_SECONDS", 0.01)


def test_a_response_of_two_turns_and_a_result(rewards) -> None:
    engine = ScriptedEngine(two_turns, weight_version=3)

    group, _ = sample(rewards, ask_once, engine, weight_version=3)

    assert group.samples[0] == Sample(
        response_ids=(10, ASK, 50, 51, 20, 21, END),
        log_probs=(-0.5, -0.25, 0.0, 0.0, -0.5, -0.25, -0.125),
        text=f"10 {ASK} 50 51 20 21 {END}",
        finish_reason="stop",
        weight_version=3,
        reward=7.0,  # words: the verifier sees the result too
        scored=(True, True, False, False, True, True, True),
    )
    first, other, second, _ = engine.requests  # the samples of a group are written at the same time
    assert (first.seed, other.seed, second.seed) == (*SEEDS, turn_seed(SEEDS[0], 1))
    assert second.token_ids == (*PROMPT.token_ids, 10, ASK, 50, 51) and second.max_new_tokens == 4


def test_turns_may_be_of_different_weights_while_these_change(rewards) -> None:
    """A result counts with the weights that have read it."""

    class Updated(ScriptedEngine):
        def _complete(self, request: SampleRequest, sampling: SamplingParameters) -> Completion:
            self._weight_version = 3 if request.token_ids == PROMPT.token_ids else 4
            return super()._complete(request, sampling)

    group, _ = sample(rewards, ask_once, Updated(two_turns), versions=lambda: range(3, 5))

    assert (group.samples[0].older_versions, group.samples[0].weight_version) == (((3, 2),), 4)


def test_a_response_of_the_model_alone_is_as_without_a_function(rewards) -> None:
    engine = ScriptedEngine(lambda request: (10, 11, END))
    group, _ = sample(rewards, engine_alone, engine)
    assert group.samples[0].scored is None
    assert [request.seed for request in engine.requests] == list(SEEDS)


@pytest.mark.parametrize(
    ("tokens", "response"),
    [(2, (10, ASK)), (3, (10, ASK)), (4, (10, ASK, 50, 51)), (6, (10, ASK, 50, 51, 20, 21))],
)
def test_all_tokens_count_towards_the_limit(rewards, tokens, response) -> None:
    """A result that does not fit is left out."""
    group, _ = sample(rewards, ask_once, ScriptedEngine(two_turns), tokens=tokens)
    cut = group.samples[0]
    assert tuple(cut.response_ids) == response and cut.finish_reason == "length"


@pytest.mark.parametrize("function", [ask_once, swallows_errors])
@pytest.mark.parametrize("failure", [EngineError("out of order"), None], ids=["failed", "aborted"])
def test_a_sample_whose_turn_failed_starts_again(rewards, at_once, function, failure) -> None:
    failures = [failure]

    def second_turn_fails_once(request: SampleRequest) -> Answer:
        is_second = len(request.token_ids) > len(PROMPT.token_ids)
        return failures.pop() if is_second and failures else two_turns(request)

    undisturbed, _ = sample(rewards, function, ScriptedEngine(two_turns))
    group, lost = sample(rewards, function, ScriptedEngine(second_turn_fails_once), request_attempts=2)
    assert group == undisturbed and not lost and not failures


def test_a_lost_engine_leaves_its_samples_to_another(rewards) -> None:
    class Dying(ScriptedEngine):
        async def check_health(self, timeout_seconds: float) -> None:
            raise EngineError("gone")

    def dies_in_the_second_turn(request: SampleRequest) -> Answer:
        return two_turns(request) if len(request.token_ids) == len(PROMPT.token_ids) else EngineError("cut")

    undisturbed, _ = sample(rewards, ask_once, ScriptedEngine(two_turns))
    group, lost = sample(rewards, ask_once, Dying(dies_in_the_second_turn), ScriptedEngine(two_turns))
    assert group == undisturbed and lost == {0: "cut"}


def test_weights_that_change_between_turns_are_noticed(rewards) -> None:
    engine = ScriptedEngine(two_turns)

    async def weights_change(response: GrowingResponse) -> None:
        await response.sample(stop_token_ids=[ASK])
        engine._weight_version = 1
        await response.sample()

    with pytest.raises(StaleWeightsError, match=r"prompt 100 was generated with weight version \[0, 1\]"):
        sample(rewards, weights_change, engine)


async def two_turns_at_once(response: GrowingResponse) -> None:
    await asyncio.gather(response.sample(), response.sample())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (defective, r"defective failed for prompt 100: KeyError: 'no such tool' \(.*test_custom_generation.py, line"),
        (only_inserts, "none of the response's tokens are the model's"),
        (two_turns_at_once, "await one turn before the next"),
    ],
)
def test_a_defective_function_ends_the_run_with_its_name(rewards, function, message) -> None:
    with pytest.raises(UserError, match=f"rollout.generate: .*{message}"):
        sample(rewards, function, ScriptedEngine(two_turns), request_attempts=3)


def test_a_turn_that_is_cut_and_a_limit_of_its_own() -> None:
    response = GrowingResponse(
        PROMPT, 1, ScriptedEngine(lambda request: (10, 11, 12, 13, 14)), SAMPLING, list, decode_as_numbers
    )
    turn = asyncio.run(response.sample(max_new_tokens=3))
    assert turn.token_ids == (10, 11, 12) and turn.finish_reason == "length" and not response.is_truncated
    response.keep(2)
    assert response.token_ids == (10, 11) and response.remaining_tokens == 6
    assert asyncio.run(response.sample(max_new_tokens=0)).token_ids == () and not response.is_truncated


async def earns_in_turns(response: GrowingResponse) -> None:
    await response.sample(stop_token_ids=[ASK])
    response.reward(0.5)
    response.insert([50, 51])
    response.reward(9)
    response.keep(2)  # what was inserted is taken back, and with it the reward for it
    response.insert([50, 51])
    await response.sample()
    response.reward(-0.25)


def test_rewards_of_turns_are_added_to_the_verifiers_and_recorded(rewards, tmp_path: Path) -> None:
    group, _ = sample(rewards, earns_in_turns, ScriptedEngine(two_turns))
    assert group.samples[0].turn_rewards == ((2, 0.5), (7, -0.25)) and group.samples[0].reward == 7.25
    write_groups(tmp_path / "step.jsonl", [group])
    assert read_groups(tmp_path / "step.jsonl") == [group]
    assert generation_metrics(group.samples) == {"response/inserted_tokens": 2.0, "reward/recorded_mean": 0.25}

    async def earns_nonsense(response: GrowingResponse) -> None:
        response.reward(math.nan)

    with pytest.raises(UserError, match="a reward must be a finite number, not nan"):
        sample(rewards, earns_nonsense, ScriptedEngine(two_turns))


def test_what_the_trainer_scores_in_both_spaces(rewards, tmp_path: Path) -> None:
    """The recording, too, has what is scored. P(y) is that of the model's tokens given the results before them."""
    group, _ = sample(rewards, ask_once, ScriptedEngine(two_turns))
    write_groups(tmp_path / "step.jsonl", [group])
    (recorded,) = read_groups(tmp_path / "step.jsonl")
    assert recorded == group

    for space, context in ((PostTrain(), PROMPT.token_ids), (PreTrain(), (5,))):
        experience = build_experience(responses_of([recorded], 0), space, (5,))
        (sequence, _) = experience.sequences
        assert list(sequence.token_ids) == [*context, *group.samples[0].response_ids]
        assert (sequence.scored_positions - len(context)).tolist() == [0, 1, 4, 5, 6]
        assert experience.engine_log_probs[0].tolist() == [-0.5, -0.25, -0.5, -0.25, -0.125]
    assert entropy_metrics(group.samples) == {"response/conditional_entropy": pytest.approx(1.625 / 5)}


def test_the_function_is_found_and_takes_its_options() -> None:
    path = "tests.rollout.test_custom_generation"

    def load(name: str, **options: Any) -> CustomGeneration | None:
        config = RolloutConfig(generate=f"{path}:{name}", generate_options=options)
        return custom_generation(config, list, decode_as_numbers)

    function = load("ask_once", result="1").function
    assert function.func is ask_once and function.keywords == {"result": "1"}
    assert load("AskOften", times=2).function.times == 2
    assert custom_generation(RolloutConfig(), None, decode_as_numbers) is None
    for name, missing in (("ask_once", "results"), ("AskOften", "times")):
        with pytest.raises(UserError, match=f"rollout.generate_options: .*{name} .*'{missing}'"):
            load(name, results="1")
    for name in ("two_turns", "nothing"):
        with pytest.raises(UserError, match=f"has no function `{name}` that begins with `async def`"):
            load(name)
    with pytest.raises(UserError, match="rollout.generate: cannot import `nowhere`"):
        custom_generation(RolloutConfig(generate="nowhere:f"), list, decode_as_numbers)


@pytest.mark.parametrize(
    "settings", [{"partial_rollouts": {}}, {"routing_replay": True}, {"deterministic": True}], ids=lambda one: [*one][0]
)
def test_what_conflicts_with_a_function_is_refused(settings) -> None:
    with pytest.raises(ValueError, match=f"generate: .*{[*settings][0]}"):
        RolloutConfig(generate="tests.rollout:f", **settings)
    with pytest.raises(ValueError, match="generate_options are for the function in generate"):
        RolloutConfig(generate_options={"a": 1})


def test_log_probs_over_several_turns_equal_transformers(
    engine_rollout: EngineRollout, rewards: RewardPool, tiny_model_folder: Path
) -> None:
    """On a real engine, every turn's tokens are scored given the prompt and all tokens before, inserted ones too."""
    model = Qwen3ForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    engine_rollout.load_weights(lambda: [list(model.named_parameters())], engine_rollout.weight_version + 1)

    async def three_turns(response: GrowingResponse) -> None:
        for inserted in ("50 51 52", "60"):
            await response.sample(max_new_tokens=5)
            response.insert(inserted)
        await response.sample()

    prompts, sampling = numbered_prompts(2), SamplingParameters(20, stop_token_ids=())
    request = batch_request(
        [UnfinishedGroup.new(prompt, SEEDS) for prompt in prompts],
        sampling,
        weight_version=engine_rollout.weight_version,
        generation=generation(three_turns),
    )
    batch = RolloutBatch(request, 1)
    assert not dispatch(batch, engine_rollout.engine_addresses, rewards, BatchProgress())

    scored = (True,) * 5 + (False,) * 3 + (True,) * 5 + (False,) + (True,) * 6
    for group in batch.finished_groups:
        for one in group.samples:
            assert one.scored == scored and one.finish_reason == "length"
            assert tuple(one.response_ids[5:8]) == (50, 51, 52) and one.response_ids[13] == 60
            reference = transformers_log_probs(model, group.prompt.token_ids, one.response_ids, 1.0)
            expected = torch.where(torch.tensor(scored), reference, 0.0)
            torch.testing.assert_close(torch.tensor(one.log_probs), expected, atol=1e-4, rtol=0)
            assert math.isfinite(one.reward)
