"""Mixtures: shares follow the weights at every moment, and a resumed mixture continues exactly."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.data.mixture import build_sampler, in_mixture
from megatron_dsrl.data.prompt import Prompt

weights = st.lists(st.floats(0.1, 10), min_size=2, max_size=4)


def prompts(count: int, name: str = "") -> list[Prompt]:
    return [Prompt(index, f"{name}{index}", (index,), "") for index in range(0, 2 * count, 2)]  # with dropped rows


def mixture(*set_weights: float, **fields: object) -> DataConfig:
    first, *others = set_weights
    further = [{"source": "b", "name": f"set{i}", "weight": weight} for i, weight in enumerate(others)]
    return DataConfig.model_validate({"source": "a", "weight": first, "mixed_with": further, **fields})


def members(config: DataConfig, sizes: list[int]) -> list[Prompt]:
    return in_mixture([(one.name, prompts(size, one.name)) for one, size in zip(config.sets, sizes, strict=True)])


def test_a_single_set_is_what_it_was() -> None:
    alone = prompts(3)
    assert in_mixture([("main", alone)]) == alone


def test_indices_of_a_mixture_are_unique_and_name_their_set() -> None:
    mixed = members(mixture(1.0, 1.0), [3, 2])
    assert [(prompt.prompt_set, prompt.index) for prompt in mixed] == [
        ("main", 0), ("main", 2), ("main", 4), ("set0", 5), ("set0", 7),
    ]  # fmt: skip


@given(weights, st.integers(1, 60))
def test_each_set_is_within_one_prompt_of_its_share(chosen: list[float], count: int) -> None:
    config = mixture(*chosen)
    mixed = members(config, [5] * len(chosen))
    taken = Counter(mixed[i].prompt_set for i in build_sampler(config, mixed, seed=1).next(count))
    for one in config.sets:
        assert abs(taken[one.name] - count * one.weight / sum(chosen)) < 1


@given(st.integers(0, 40), st.integers(0, 40))
def test_a_resumed_mixture_continues_the_same_sequence(before: int, after: int) -> None:
    config = mixture(2.0, 1.0)
    mixed = members(config, [5, 3])
    straight, resumed = build_sampler(config, mixed, seed=1), build_sampler(config, mixed, seed=1)
    straight.next(before)
    resumed.load_state_dict(straight.state_dict())
    assert resumed.next(after) == straight.next(after)


def test_every_set_has_its_own_epochs() -> None:
    config = mixture(1.0, 1.0)
    drawn = build_sampler(config, members(config, [2, 6]), seed=1).next(12)
    assert sorted(drawn) == sorted([0, 1] * 3 + [2, 3, 4, 5, 6, 7])


def test_a_run_is_not_resumed_with_other_sets() -> None:
    two, one = mixture(1.0, 1.0), mixture(1.0)
    of_two, of_one = build_sampler(two, members(two, [2, 2]), seed=1), build_sampler(one, prompts(2), seed=1)
    with pytest.raises(UserError, match=r"written with 1 prompt set\(s\), this run has 2"):
        of_two.load_state_dict(of_one.state_dict())
    with pytest.raises(UserError, match="written with 2 prompt sets, this run has one"):
        of_one.load_state_dict(of_two.state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "set0"}, "the sets' names must differ"),
        ({"max_prompt_tokens": 100}, "mixed_with.0.max_prompt_tokens: 1024 is more than the first set's 100"),
        ({"min_pass_rate": 0.5}, "need pass_rates_from"),
        ({"min_pass_rate": 0.5, "max_pass_rate": 0.1}, "no prompt would be left"),
    ],
)
def test_sets_that_do_not_fit_together(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(1.0, 1.0, **fields)
