"""Rounds of sampling until enough groups are mixed."""

from megatron_dsrl.config.rollout import DynamicSamplingConfig
from megatron_dsrl.rollout.dynamic_sampling import DynamicBatch, is_mixed, sample_until_mixed
from megatron_dsrl.rollout.sample import Group
from tests.observability.synthetic_run import make_group

RIGHT, WRONG, MIXED = [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]


def sample(rounds: list[list[list[float]]], wanted: int, **limits: object) -> tuple[DynamicBatch, list[int]]:
    """The batch made of the given rounds of rewards, and how many prompts each round was asked for."""
    asked = []

    def sample_round(number: int, count: int) -> list[Group]:
        asked.append(count)
        return [make_group(rewards, index=100 * number + i) for i, rewards in enumerate(rounds[number])]

    return sample_until_mixed(sample_round, wanted, DynamicSamplingConfig(**limits)), asked


def test_every_round_asks_for_what_is_missing_until_all_groups_are_mixed():
    batch, asked = sample([[RIGHT, MIXED, WRONG], [WRONG, MIXED], [MIXED]], wanted=3)
    assert asked == [3, 2, 1]
    assert [group.prompt.index for group in batch.kept] == [1, 101, 200]
    assert len(batch.sampled) == 6 and all(map(is_mixed, batch.kept))
    assert batch.metrics(wanted=3) == {
        "dynamic_sampling/rounds": 3,
        "dynamic_sampling/sampled_groups": 6,
        "dynamic_sampling/surplus_groups": 0,
        "dynamic_sampling/missing_groups": 0,
    }


def test_oversampling_takes_fewer_rounds_and_leaves_a_surplus():
    batch, asked = sample([[MIXED, WRONG, MIXED, MIXED]], wanted=2, oversampling=1.6)
    assert asked == [4]
    assert [group.prompt.index for group in batch.kept] == [0, 2]
    assert batch.metrics(wanted=2)["dynamic_sampling/surplus_groups"] == 1


def test_the_rounds_are_limited_and_what_is_missing_is_counted():
    batch, asked = sample([[WRONG, MIXED], [WRONG]], wanted=2, max_rounds=2)
    assert asked == [2, 1] and len(batch.kept) == 1
    assert batch.metrics(wanted=2)["dynamic_sampling/missing_groups"] == 1
