"""A response that the model of the tiny task and a calculator write together."""

from megatron_dsrl.rollout.calculator import answer
from megatron_dsrl.rollout.growing_response import GrowingResponse


async def with_calculator(response: GrowingResponse, max_calls: int = 4) -> None:
    """Write the value of the line above after each `=` with which the model begins a line.

    Args:
        response: is empty.
        max_calls: lines that the calculator completes; the model writes the rest of the response by itself.
    """
    equals = tuple(response.encode("\n="))  # one token of this tokenizer
    for _ in range(max_calls):
        turn = await response.sample(stop_token_ids=equals)
        if turn.token_ids[-1:] != equals:
            return
        *_, line_above, _ = ["", *response.text.split("\n")]
        if not response.insert(answer(line_above.removeprefix("="))):
            return
    await response.sample()
