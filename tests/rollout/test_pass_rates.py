"""Pass rates from recorded rollouts."""

from pathlib import Path

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.pass_rates import read_pass_rates, with_pass_rates, within_pass_rates
from megatron_dsrl.rollout.recording import rollout_file, write_groups
from megatron_dsrl.rollout.sample import Sample, SampleGroup

EASY, HARD, UNSEEN = (Prompt(i, "", (i, i), "") for i in range(3))


def group(prompt: Prompt, *rewards: float) -> SampleGroup:
    return SampleGroup(prompt, tuple(Sample((1,), (-0.1,), "", "stop", 1, reward) for reward in rewards))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_groups(rollout_file(tmp_path, 1), [group(EASY, 1.0, 1.0)], [group(HARD, 0.0, 0.5)])
    write_groups(rollout_file(tmp_path, 2), [group(EASY, 1.0, 0.0)])
    return tmp_path


def test_rates_are_over_all_steps_and_groups(run: Path) -> None:
    rates = read_pass_rates(run, "data.pass_rates_from")
    assert [prompt.pass_rate for prompt in with_pass_rates([EASY, HARD, UNSEEN], rates)] == [0.75, 0.0, None]


def test_prompts_within_a_range(run: Path) -> None:
    prompts = with_pass_rates([EASY, HARD, UNSEEN], read_pass_rates(run, "data.pass_rates_from"))
    assert within_pass_rates(prompts, 0.1, 0.9, "data.min_pass_rate") == prompts[:1]
    assert within_pass_rates(prompts, 0.0, 0.9, "data.min_pass_rate") == prompts[:2], "unknown rates are dropped"
    with pytest.raises(UserError, match=r"data.min_pass_rate: no prompt has .* 0.8 to 0.9, and only 2 of 3 have"):
        within_pass_rates(prompts, 0.8, 0.9, "data.min_pass_rate")


def test_a_run_without_recordings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.pass_rates_from: .* has no recorded rollouts; record some with `dsrl"):
        read_pass_rates(tmp_path, "data.pass_rates_from")
