"""DAPO's soft overlong punishment, on the numbers of its paper."""

import pytest

from megatron_dsrl.algorithms.experience import Response
from megatron_dsrl.algorithms.reward_shaping import overlong_shaping, shape_rewards
from megatron_dsrl.config.data import OverlongConfig


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0), (16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (30000, -1)]
)
def test_the_penalty_grows_over_the_buffer(length, penalty):
    """A limit of 20,480 tokens with a buffer of 4,096."""
    assert overlong_shaping(length, 20480, 4096) == penalty


def test_shaping_adds_to_the_verified_reward():
    responses = [Response((1,), (2,) * length, (-1.0,) * length, reward, 0) for length, reward in [(8, 1.0), (9, 0.0)]]
    shaped = shape_rewards(responses, OverlongConfig(buffer_tokens=4, penalty=0.5), max_response_tokens=10)
    assert [r.reward for r in shaped] == [1.0 - 0.5 * 2 / 4, 0.0 - 0.5 * 3 / 4]
    assert shape_rewards(responses, None, 10) == responses
