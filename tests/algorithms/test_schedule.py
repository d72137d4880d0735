"""Steps count from 1 and a phase's last step is inclusive, as the paper's I[s > S]."""

import pytest

from megatron_dsrl.algorithms.advantages import GroupMean, GroupStandardised
from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain
from megatron_dsrl.config.phase import PhaseConfig


def phase(name: str, until_step: int | None) -> PhaseConfig:
    return PhaseConfig(name=name, until_step=until_step, space=PostTrain(), advantage=GroupMean())


def test_a_warm_up_of_twenty_steps_covers_steps_1_to_20() -> None:
    warm_up = PhaseConfig(
        name="NSR-PreRL",
        until_step=20,
        space=PreTrain(),
        advantage=GroupMean(),
        filter="negative",
    )
    grpo = PhaseConfig(name="GRPO", space=PostTrain(), advantage=GroupStandardised())
    schedule = Schedule([warm_up, grpo])
    assert [schedule.at(step).name for step in (1, 20, 21, 5000)] == ["NSR-PreRL", "NSR-PreRL", "GRPO", "GRPO"]


@pytest.mark.parametrize("ends", [[5, 5], [9, 3], [None, 3], []])
def test_phases_out_of_order_are_refused(ends) -> None:
    with pytest.raises(ValueError, match="until_step"):
        Schedule([phase(str(end), end) for end in ends])


def test_a_step_behind_the_last_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="step 4"):
        Schedule([phase("only", 3)]).at(4)
