"""A ready-made `rollout.generate`: the model calls a calculator in its response, and reads what it answers."""

from bisect import bisect_left
from collections.abc import Sequence

from megatron_dsrl.rollout.calculator import answer
from megatron_dsrl.rollout.growing_response import GrowingResponse


async def calculator_chat(
    response: GrowingResponse,
    opening: str = "<tool>",
    closing: str = "</tool>",
    before_result: str = "<result>",
    after_result: str = "</result>",
    max_calls: int = 8,
) -> None:
    """Let the model write until it ends its response, and answer every `<tool>12*7</tool>` with `<result>84</result>`.

    If `closing` is a single token, as `</tool_call>` is for Qwen3, the model stops right there. Otherwise it writes on,
    and what follows the first complete call is dropped, which costs the time to sample it. A model that was trained on
    tool calls in chat turns gets its own format with, for Qwen3,
    `before_result: "<|im_end|>\\n<|im_start|>user\\n<tool_response>\\n"` and
    `after_result: "\\n</tool_response><|im_end|>\\n<|im_start|>assistant\\n"`.

    Args:
        response: is empty.
        opening: text before an expression.
        closing: text after it.
        before_result: inserted before the calculator's answer; special tokens are recognised.
        after_result: inserted after it.
        max_calls: calls that are answered. A response that makes another one ends there and counts as truncated.
    """
    closing_ids = response.encode(closing)
    stops = closing_ids if len(closing_ids) == 1 else ()
    for _ in range(max_calls):
        if not await _write_call(response, closing, stops):
            return
        expression = _last_call(response.text, opening, closing)
        if not response.insert(before_result + answer(expression) + after_result):
            return
    if await _write_call(response, closing, stops):
        response.is_truncated = True


async def _write_call(response: GrowingResponse, closing: str, stops: Sequence[int]) -> bool:
    """Have the model write up to its next complete call; False if it ends without one."""
    start = len(response.token_ids)
    turn = await response.sample(stop_token_ids=stops)

    def has_call(count: int) -> bool:
        return closing in response.decode(turn.token_ids[:count])

    if not has_call(len(turn.token_ids)):
        return False
    response.keep(start + bisect_left(range(len(turn.token_ids)), True, key=has_call))
    return True


def _last_call(text: str, opening: str, closing: str) -> str:
    """The expression of the call that ends the text; empty if it was not opened."""
    before, opened, inside = text[: text.rindex(closing)].rpartition(opening)
    return inside if opened else ""
