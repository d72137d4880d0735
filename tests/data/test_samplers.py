"""Every epoch is a permutation, a resumed sampler goes on exactly where it stood, and orders of a set's prompts."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.samplers import PromptSampler, SamplerOptions, build_sampler, in_mixture

sizes = st.integers(1, 30)
seeds = st.integers(0, 2**31)
batches = st.lists(st.integers(0, 40), max_size=12)


def draw(sampler: PromptSampler, counts: list[int]) -> list[list[int]]:
    return [sampler.next(count) for count in counts]


@given(sizes, seeds, batches)
def test_every_epoch_holds_every_prompt_once_however_it_is_cut_into_batches(num_prompts, seed, counts) -> None:
    drawn = draw(PromptSampler(num_prompts, seed), counts)
    assert [len(batch) for batch in drawn] == counts
    indices = sum(drawn, [])
    for start in range(0, len(indices), num_prompts):
        epoch = indices[start : start + num_prompts]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(num_prompts))


@given(sizes, seeds, batches, batches)
def test_resumed_sampler_continues_the_same_sequence(num_prompts, seed, before, after) -> None:
    straight, resumed = PromptSampler(num_prompts, seed), PromptSampler(num_prompts, seed)
    draw(straight, before)
    resumed.load_state_dict(straight.state_dict())
    assert draw(resumed, after) == draw(straight, after)


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    sampler = PromptSampler(50, seed=1)
    first, second = sampler.next(50), sampler.next(50)
    assert first != second != list(range(50)) != first
    assert PromptSampler(50, seed=2).next(50) != first


def test_a_batch_may_hold_an_index_twice_only_where_an_epoch_ends() -> None:
    sampler = PromptSampler(3, seed=1)
    assert sorted(sampler.next(7)) in ([0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 2])


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ((4, 1), "data.source: .* with 5 as the number of prompts, now it is 4"),
        ((5, 2), "seed: .* with 1 as the seed, now it is 2"),
    ],
)
def test_state_of_another_run_is_refused(other, name) -> None:
    state = PromptSampler(5, 1).state_dict()
    with pytest.raises(UserError, match=name):
        PromptSampler(*other).load_state_dict(state)


def test_empty_prompt_set_is_refused() -> None:
    with pytest.raises(UserError, match="at least one prompt"):
        PromptSampler(0, 1)


RATES = [0.0, None, 1.0, 0.5, 0.5, 1.0]
PROMPTS = [Prompt(i, "", (i,), "", pass_rate=rate) for i, rate in enumerate(RATES)]


class Backwards(SamplerOptions):
    """A custom order: by index, from the last."""

    def reorder(self, prompts: list[Prompt], epoch: int, shuffled: list[int]) -> list[int]:
        return sorted(shuffled, reverse=True)


def order(sampler: object, prompts: list[Prompt] = PROMPTS, epochs: int = 1, seed: int = 1) -> list[int]:
    config = DataConfig.model_validate({"source": "a", "sampler": sampler})
    return build_sampler(config, prompts, seed).next(epochs * len(prompts))


def test_easy_first_is_a_curriculum() -> None:
    drawn = order("easy_first")
    assert [RATES[i] for i in drawn] == [1.0, 1.0, 0.5, 0.5, 0.0, None]
    assert any(order("easy_first", seed=seed) != drawn for seed in range(2, 9)), "equal ones are shuffled"


def test_easy_first_for_some_epochs() -> None:
    drawn = order({"name": "easy_first", "epochs": 1}, epochs=2)
    assert (drawn[:6], drawn[6:]) == (order("easy_first"), order("shuffled", epochs=2)[6:])


def test_a_custom_order_by_its_dotted_path() -> None:
    assert order("tests.data.test_samplers:Backwards", epochs=2) == [5, 4, 3, 2, 1, 0] * 2


class Hardest(SamplerOptions):
    """A mistake: it leaves prompts out."""

    def reorder(self, prompts: list[Prompt], epoch: int, shuffled: list[int]) -> list[int]:
        return shuffled[:2]


def test_a_custom_order_that_leaves_prompts_out_is_refused() -> None:
    with pytest.raises(UserError, match="data.sampler: `reorder` must return every position once"):
        order("tests.data.test_samplers:Hardest")


def test_easy_first_needs_pass_rates() -> None:
    with pytest.raises(UserError, match="easy_first needs pass rates; set data.pass_rates_from"):
        order("easy_first", [replace(prompt, pass_rate=None) for prompt in PROMPTS])


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
