"""Functions for `rollout.generate` in tests."""

from megatron_dsrl.rollout.growing_response import GrowingResponse


async def take_turns(response: GrowingResponse, turn_tokens: int = 5, between: str = "12") -> None:
    """Turns of the model with text between them, until it ends the response or the response is full; 0.25 for each."""
    while True:
        turn = await response.sample(max_new_tokens=turn_tokens)
        response.reward(0.25)
        if turn.finish_reason == "stop" or not response.insert(between):
            return
