"""Every epoch is a permutation, a resumed sampler continues exactly where it was, and orders of a set's prompts."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.data.mixture import build_sampler
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.samplers import PromptSampler, SamplerOptions

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
def test_state_of_a_different_run_is_refused(other, name) -> None:
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
