"""The calculator in a chat, with the tokenizer of the tiny task, in which `</tool>` is several tokens or one."""

import asyncio

import pytest

from examples.tiny_dsrl.tokenizer import PIECES, build_tokenizer
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.tokenizer import decode, encode
from megatron_dsrl.rollout.growing_response import GrowingResponse
from megatron_dsrl.rollout.sample import SamplingParameters
from megatron_dsrl.rollout.tool_chat import calculator_chat
from tests.support.scripted_engine import ScriptedEngine

PROMPT = Prompt(0, text="", token_ids=(1,), answer="")


def chat(*turns: str, pieces: tuple[str, ...] = (), tokens: int = 200, **options: object) -> GrowingResponse:
    """The response to a model that writes these turns, of which a stop token may cut the end."""
    tokenizer = build_tokenizer((*PIECES, *pieces), vocab_size=128)
    ids = [encode(tokenizer, turn) for turn in turns]
    engine = ScriptedEngine(lambda request: ids[len(engine.requests) - 1])
    sampling = SamplingParameters(tokens, (tokenizer.eos_token_id,))
    response = GrowingResponse(
        PROMPT, 1, engine, sampling, lambda text: encode(tokenizer, text), lambda ids: decode(tokenizer, ids)
    )
    asyncio.run(calculator_chat(response, **options))
    return response


@pytest.mark.parametrize("pieces", [(), ("</tool>",)], ids=["several tokens", "one token"])
def test_calls_are_answered_and_what_follows_them_is_dropped(pieces) -> None:
    response = chat(
        "So <tool>12*7</tool><result>1</result> is", " and <tool>84/0</tool>.", " done<|im_end|>", pieces=pieces
    )
    assert response.text == (
        "So <tool>12*7</tool><result>84</result> and <tool>84/0</tool><result>error: division by zero</result> done"
    )
    completion = response.as_completion()
    tokenizer = build_tokenizer((*PIECES, *pieces), vocab_size=128)
    model_wrote = [token for token, own in zip(completion.response_ids, completion.scored) if own]
    assert decode(tokenizer, model_wrote, skip_special_tokens=False) == (
        "So <tool>12*7</tool> and <tool>84/0</tool> done<|im_end|>"
    )
    assert completion.finish_reason == "stop"


def test_an_end_without_an_opening_and_one_call_too_many() -> None:
    response = chat("7</tool>", "<tool>1</tool> and on", max_calls=1)
    assert response.text == "7</tool><result>error: not an arithmetic expression</result><tool>1</tool>"
    assert response.as_completion().finish_reason == "length"


def test_a_chat_turn_around_the_result() -> None:
    before, after = "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    response = chat("<tool>2+2</tool>", "4<|im_end|>", before_result=before, after_result=after)
    assert response.text == "<tool>2+2</tool>\nuser\n4\nassistant\n4"


def test_a_result_that_does_not_fit_ends_the_response() -> None:
    response = chat("<tool>2+2</tool>", "4<|im_end|>", tokens=20)
    assert response.text == "<tool>2+2</tool>" and response.is_truncated
