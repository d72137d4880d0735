"""Shaping of verified rewards by what is known about the response itself.

It happens on the way to the advantages: what is recorded and evaluated is the verifier's own score, and dynamic
sampling looks at that too.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_dsrl.algorithms.experience import Response
from megatron_dsrl.config.data import OverlongConfig


def shape_rewards(
    responses: Sequence[Response], overlong: OverlongConfig | None, max_response_tokens: int
) -> list[Response]:
    """The responses with the overlong penalty added to their rewards; unchanged without one."""
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
    """What `shape_rewards` makes of a step's responses, at least one; nothing without a penalty.

    Returns:
        `reward/shaped_mean`: mean of the rewards that advantages are made of. `reward/overlong_fraction`: responses
        that were punished, whatever their reward was.
    """
    if overlong is None:
        return {}
    shaped = shape_rewards(responses, overlong, max_response_tokens)
    punished = sum(after.reward < before.reward for before, after in zip(responses, shaped))
    return {
        "reward/shaped_mean": sum(response.reward for response in shaped) / len(shaped),
        "reward/overlong_fraction": punished / len(shaped),
    }


def overlong_shaping(length: int, max_response_tokens: int, buffer_tokens: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, on overlong reward shaping).

    0 up to the buffer, which is the last part of the allowed length, then falling linearly to -1 at its end.

    Args:
        length: tokens of the response, the end token included.
        max_response_tokens: L_max.
        buffer_tokens: L_cache.
    """
    over = length - (max_response_tokens - buffer_tokens)
    return -min(1.0, max(0.0, over / buffer_tokens))
