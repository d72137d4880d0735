"""Pass rates are over all steps that a run has recorded; they order and filter prompts."""

from pathlib import Path

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import TrainingSetConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.pass_rates import with_pass_rates
from megatron_dsrl.rollout.recording import rollout_file, write_groups
from megatron_dsrl.rollout.sample import Sample, SampleGroup

PROMPTS = EASY, HARD, UNSEEN = [Prompt(i, "", (i, i), "") for i in range(3)]


def group(prompt: Prompt, *rewards: float) -> SampleGroup:
    return SampleGroup(prompt, tuple(Sample((1,), (-0.1,), "", "stop", 1, reward) for reward in rewards))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_groups(rollout_file(tmp_path, 1), [group(EASY, 1.0, 1.0)], [group(HARD, 0.0, 0.5)])
    write_groups(rollout_file(tmp_path, 2), [group(EASY, 1.0, 0.0)])
    return tmp_path


def rates(run: Path, **limits: float) -> list[float | None]:
    config = TrainingSetConfig(source="unused", pass_rates_from=str(run), **limits)
    return [prompt.pass_rate for prompt in with_pass_rates(PROMPTS, config, "data")]


def test_rates_are_over_all_steps_and_groups(run: Path) -> None:
    assert rates(run) == [0.75, 0.0, None]


def test_prompts_within_a_range(run: Path) -> None:
    assert rates(run, min_pass_rate=0.1, max_pass_rate=0.9) == [0.75]
    assert rates(run, max_pass_rate=0.9) == [0.75, 0.0], "unknown rates are dropped"
    with pytest.raises(UserError, match=r"data.min_pass_rate: no prompt has .* 0.8 to 0.9, and only 2 of 3 have"):
        rates(run, min_pass_rate=0.8, max_pass_rate=0.9)


def test_a_run_without_recordings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.pass_rates_from: .* has no recorded rollouts; record some with `dsrl"):
        rates(tmp_path)
