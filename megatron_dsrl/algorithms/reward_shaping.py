"""Reward shaping: adjust verifier rewards by properties of the response, such as its length.

Shaping only affects advantages. Records, evaluation and dynamic sampling use the verifier's raw score.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_dsrl.algorithms.experience import Response
from megatron_dsrl.config.data import OverlongConfig


def shape_rewards(
    responses: Sequence[Response], overlong: OverlongConfig | None, max_response_tokens: int
) -> list[Response]:
    """Add the overlong penalty, if configured, to the rewards."""
    if overlong is None:
        return list(responses)
    return [
        replace(
            response,
            reward=response.reward
            + overlong.penalty
            * overlong_shaping(len(response.response_ids), max_response_tokens, overlong.buffer_tokens),
        )
        for response in responses
    ]


def shaping_metrics(
    responses: Sequence[Response], overlong: OverlongConfig | None, max_response_tokens: int
) -> dict[str, float]:
    """Metrics of `shape_rewards` over a step's responses, at least one: the mean of the shaped rewards, and the
    fraction of penalised responses. Empty if no penalty is configured."""
    if overlong is None:
        return {}
    shaped = shape_rewards(responses, overlong, max_response_tokens)
    punished = sum(after.reward < before.reward for before, after in zip(responses, shaped))
    return {
        "reward/shaped_mean": sum(response.reward for response in shaped) / len(shaped),
        "reward/overlong_fraction": punished / len(shaped),
    }


def overlong_shaping(length: int, max_response_tokens: int, buffer_tokens: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, section on overlong reward shaping).

    0 up to the buffer, the last `buffer_tokens` (L_cache) of the allowed length (L_max); falls linearly to -1 across
    the buffer. `length` includes the end token.
    """
    over = length - (max_response_tokens - buffer_tokens)
    return -min(1.0, max(0.0, over / buffer_tokens))
