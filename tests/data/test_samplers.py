"""Orders of a set's prompts."""

from dataclasses import replace

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.data.mixture import build_sampler
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.samplers import SamplerOptions

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


def test_easy_first_needs_pass_rates() -> None:
    with pytest.raises(UserError, match="easy_first needs pass rates; set data.pass_rates_from"):
        order("easy_first", [replace(prompt, pass_rate=None) for prompt in PROMPTS])
