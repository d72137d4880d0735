"""What a fault is: its target, what it does, and what must be true afterwards."""

import importlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import StrEnum
from typing import ClassVar

from tools.fault_soak.training import Training

MODULES = ("engine_faults", "reward_faults", "trainer_faults", "disk_faults", "file_faults")


class Moment(StrEnum):
    """When a fault happens: as soon as a part of a step has begun; `START` is while the command starts."""

    START = "start"
    GENERATE = "generate"
    TRAIN = "train"
    PUSH_WEIGHTS = "push_weights"
    SAVE = "save_checkpoint"


IN_A_STEP = (Moment.GENERATE, Moment.TRAIN, Moment.PUSH_WEIGHTS, Moment.SAVE)

FAILED, USER_ERROR, PREEMPTED, HUNG_UP, INTERRUPTED, KILLED, TERMINATED = 1, 2, 75, 129, 130, 137, 143
"""Exit statuses of examples/troubleshooting; 137 is the shell's for SIGKILL."""


class Fault(ABC):
    """One disturbance. After any of them the run either continues by itself, or it ends with one of `statuses` and the
    same command continues it."""

    moments: ClassVar[tuple[Moment, ...]] = IN_A_STEP
    statuses: ClassVar[frozenset[int]] = frozenset()
    """Exit statuses with which the run may end; none: it must continue."""
    must_end: ClassVar[bool] = False
    """Whether the run must end: its continuing would be a fault that did nothing, or a request that was ignored."""
    takes_minutes: ClassVar[bool] = False
    """Only injected when named with `--only`."""

    def __init__(self, chance: random.Random) -> None:
        """
        Args:
            chance: for choices among targets.
        """
        self.chance = chance

    @abstractmethod
    def apply(self, training: Training) -> str | None:
        """Disturb the running training; returns what was hit, or None if the target does not exist (yet)."""

    def before_restart(self, training: Training, status: int) -> None:  # noqa: B027
        """Called after the run has ended with this status, before the same command is started again."""

    def problem(self, training: Training) -> str | None:
        """What is wrong once the next step is recorded, or None."""
        return None


FAULTS: dict[str, type[Fault]] = {}
"""By name; use `all_faults`, which imports the modules that register them."""


def register(name: str) -> Callable[[type[Fault]], type[Fault]]:
    """Class decorator: make a fault available under this name."""

    def add(fault: type[Fault]) -> type[Fault]:
        assert name not in FAULTS, f"two faults are called {name}"
        FAULTS[name] = fault
        return fault

    return add


def all_faults() -> dict[str, type[Fault]]:
    """All faults by name, in alphabetical order."""
    for module in MODULES:
        importlib.import_module(f"tools.fault_soak.{module}")
    return dict(sorted(FAULTS.items()))
