"""Seconds per part with a clock that the test moves."""

import pytest

from megatron_dsrl.observability.timer import SecondsPerPart


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_parts_add_up_also_when_they_raise_and_the_step_is_the_whole() -> None:
    clock = ManualClock()
    timer = SecondsPerPart(clock)
    with timer.part("generate"):
        clock.now += 3
    with pytest.raises(RuntimeError), timer.part("train"):
        clock.now += 2
        raise RuntimeError
    clock.now += 0.5
    with timer.part("generate"):
        clock.now += 1

    assert timer.metrics() == {"seconds/generate": 4, "seconds/train": 2, "seconds/step": 6.5}


def test_parts_do_not_nest() -> None:
    timer = SecondsPerPart()
    with pytest.raises(AssertionError, match="train inside part generate"), timer.part("generate"):
        with timer.part("train"):
            pass
