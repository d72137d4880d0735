"""The compact form of an engine's answers: the same samples as SGLang's JSON."""

import math
from typing import Any

import orjson
import pytest

from megatron_dsrl.rollout.engines.errors import BadRequestError, EngineError
from megatron_dsrl.rollout.engines.generation import SampleRequest, read_completions
from megatron_dsrl.rollout.engines.packed_answers import pack, read_json, unpack
from megatron_dsrl.rollout.sample import SamplingParameters

REQUESTS = [SampleRequest((1, 2), seed=0, max_new_tokens=8)] * 3
SAMPLING = SamplingParameters(8, stop_token_ids=(7,))


def answer(ids: list[int], log_probs: list[float | None], reason: str = "stop") -> dict[str, Any]:
    """As SGLang's JSON has it."""
    meta = {
        "finish_reason": {"type": reason},
        "output_token_logprobs": [[each, token, None] for each, token in zip(log_probs, ids)],
        "weight_versions": [{"version": "3", "start": 0, "end": len(ids)}],
    }
    return {"text": "", "output_ids": ids, "meta_info": meta}


NEVER_BEGAN = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}}}
ANSWERS = [answer([5, 151_935, 7], [-0.1, -20.5, 0.0]), NEVER_BEGAN, answer([9], [-1.25], "length")]


def test_packed_answers_are_the_samples_of_the_json() -> None:
    packed = read_completions(unpack(pack(ANSWERS)), REQUESTS, SAMPLING)
    plain = read_completions(read_json(orjson.dumps(ANSWERS)), REQUESTS, SAMPLING)

    assert packed == plain
    assert [list(completion.response_ids) for completion in packed] == [[5, 151_935, 7], [], [9]]
    assert [list(completion.log_probs) for completion in packed] == [[pytest.approx(-0.1), -20.5, 0.0], [], [-1.25]]
    assert [completion.finish_reason for completion in packed] == ["stop", "abort", "length"]
    assert [completion.weight_versions for completion in packed] == [((3, 3),), (), ((3, 1),)]


def test_packed_answers_take_eight_bytes_per_token() -> None:
    tokens = 10_000
    assert len(pack([answer([151_935] * tokens, [-0.123456] * tokens)])) < 8 * tokens + 300


@pytest.mark.parametrize("bad", [None, math.nan, -math.inf])
def test_a_log_prob_that_is_not_finite_is_an_error(bad: float | None) -> None:
    answers = [answer([5, 6], [-0.5, bad])]
    for read in (unpack(pack(answers)), read_json(orjson.dumps(answers))):
        with pytest.raises(EngineError, match="log-prob of token 1 of a response is .*, not a finite number") as error:
            read_completions(read, REQUESTS[:1], SAMPLING)
        assert not isinstance(error.value, BadRequestError), "another attempt may succeed"


def test_answers_that_are_not_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="bytes for 4 tokens"):
        unpack(pack(ANSWERS)[:-1])
    with pytest.raises(ValueError, match="meta_info"):
        read_json(b'[{"output_ids": []}]')
    with pytest.raises(EngineError, match="2 samples to 3 requests"):
        read_completions(read_json(orjson.dumps(ANSWERS[:2])), REQUESTS, SAMPLING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finish_reason": None}, "it ended a sample with None"),
        ({"finish_reason": "stop"}, "it ended a sample with 'stop'"),
        ({"finish_reason": {"type": "error"}}, "it ended a sample with {'type': 'error'}"),
        ({"output_token_logprobs": []}, "it returned 0 log-probs for 2 tokens"),
    ],
)
def test_a_sample_without_its_parts_is_an_error_of_the_engine(change: dict[str, Any], message: str) -> None:
    sample = answer([5, 6], [-0.5, -1.0])
    sample["meta_info"] |= change
    with pytest.raises(EngineError, match=message):
        read_completions(read_json(orjson.dumps([sample])), REQUESTS[:1], SAMPLING)
