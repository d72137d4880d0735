"""DAPO's soft overlong punishment, on the numbers of its paper."""

import pytest

from megatron_dsrl.algorithms.experience import Response
from megatron_dsrl.algorithms.reward_shaping import overlong_shaping, shape_rewards, shaping_metrics
from megatron_dsrl.config.data import OverlongConfig


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0), (16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (30000, -1)]
)
def test_the_penalty_grows_over_the_buffer(length, penalty) -> None:
    """A limit of 20,480 tokens with a buffer of 4,096."""
    assert overlong_shaping(length, 20480, 4096) == penalty


def test_shaping_adds_to_the_verified_reward() -> None:
    responses = [Response((1,), (2,) * length, (-1.0,) * length, reward, 0) for length, reward in [(8, 1.0), (9, 0.0)]]
    shaped = shape_rewards(responses, OverlongConfig(buffer_tokens=4, penalty=0.5), max_response_tokens=10)
    assert [r.reward for r in shaped] == [1.0 - 0.5 * 2 / 4, 0.0 - 0.5 * 3 / 4]
    assert shape_rewards(responses, None, 10) == responses


def test_metrics_tell_the_shaped_mean_and_how_many_were_punished() -> None:
    """Lengths 8 and 9 (not 6) reach into the buffer of 4 before 10: rewards 1, 1 - 1/4 and 0 - 3/8."""
    lengths = [(6, 1.0), (8, 1.0), (9, 0.0)]
    responses = [Response((1,), (2,) * length, (-1.0,) * length, reward, 0) for length, reward in lengths]
    metrics = shaping_metrics(responses, OverlongConfig(buffer_tokens=4, penalty=0.5), max_response_tokens=10)
    assert metrics == pytest.approx({"reward/shaped_mean": (1.0 + 0.75 - 0.375) / 3, "reward/overlong_fraction": 2 / 3})
    assert shaping_metrics(responses, None, 10) == {}
