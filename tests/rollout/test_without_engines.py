"""The responses of a data set instead of samples."""

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.data.demonstrations import Demonstration
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.samplers import PromptSampler
from megatron_dsrl.rollout.rollout import responses_of, unwatched
from megatron_dsrl.rollout.without_engines import DatasetRollout

ROWS = [Demonstration(i, f"{i}?", (1, i), f"{i}", response_ids=(i, 9), truncated=i == 2) for i in range(5)]


@pytest.fixture
def rollout() -> DatasetRollout:
    config = RolloutConfig(source="dataset", prompts_per_step=2, samples_per_prompt=1)
    return DatasetRollout(config, len(ROWS), stop_token_ids=(9,))


def test_steps_go_through_the_rows_and_say_how_far(rollout) -> None:
    sampler = PromptSampler(len(ROWS), seed=1)
    steps = [rollout.sample_step(step, lambda n: [ROWS[i] for i in sampler.next(n)], unwatched) for step in (1, 2)]
    assert [step.metrics for step in steps] == [{"data/epoch": 0.4}, {"data/epoch": 0.8}]
    assert not any(step.judged for step in steps)
    groups = [group for step in steps for group in step.groups]
    assert len({group.prompt.index for group in groups}) == 4  # none twice within an epoch
    assert all(type(group.prompt) is Prompt and len(group.samples) == 1 for group in groups)


def test_a_response_is_that_of_its_row_and_not_an_engines(rollout) -> None:
    step = rollout.sample_step(1, lambda n: ROWS[1:3], unwatched)
    first, second = responses_of(step.groups, weight_version=1)
    assert (first.prompt_ids, tuple(first.response_ids), len(first.engine_log_probs)) == ((1, 1), (1, 9), 0)
    assert (first.truncated, second.truncated, first.older_tokens) == (False, True, 0)


def test_nothing_can_be_sampled(rollout) -> None:
    with pytest.raises(UserError, match="rollout.source: dataset starts no engines"):
        rollout.generate([], 1, rollout.training_sampling, "evaluation")
