"""Signals to a process of the run: the base classes of most faults."""

import signal
import time
from typing import ClassVar

import psutil

from tools.fault_soak.fault import Fault
from tools.fault_soak.processes import Role
from tools.fault_soak.training import Training

PAUSE_SECONDS = 3.0
STARVED_SECONDS = 5.0
STOPPED_SECONDS, RUNNING_SECONDS = 0.2, 0.05


class ProcessFault(Fault):
    """Does something to one process with a certain task."""

    role: ClassVar[Role]
    """Which processes; one of them is drawn."""

    def apply(self, training: Training) -> str | None:
        """Draw one of the role's processes and disturb it; None if none is running."""
        candidates = training.processes(type(self).role)
        if not candidates:
            return None
        number = self.chance.randrange(len(candidates))
        try:
            self.disturb(candidates[number])
        except psutil.NoSuchProcess:  # it has ended at this moment
            return None
        return f"{number + 1} of {len(candidates)}, process {candidates[number].pid}"

    def disturb(self, process: psutil.Process) -> None:
        """Do it; psutil.NoSuchProcess from a process that has ended meanwhile counts as nothing hit."""
        raise NotImplementedError


class SendSignal(ProcessFault):
    """Sends `number` to the process."""

    number: ClassVar[signal.Signals]

    def disturb(self, process: psutil.Process) -> None:
        process.send_signal(type(self).number)


class Kill(SendSignal):
    """kill -9."""

    number = signal.SIGKILL


class Stop(SendSignal):
    """SIGSTOP, for good: the process hangs."""

    number = signal.SIGSTOP


class Pause(ProcessFault):
    """SIGSTOP, and SIGCONT after some seconds: a machine that swaps, a disk that does not answer."""

    def disturb(self, process: psutil.Process) -> None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)
        process.send_signal(signal.SIGCONT)


class Starve(ProcessFault):
    """Runs only a fifth of the time for some seconds, as on a machine with too many processes."""

    def disturb(self, process: psutil.Process) -> None:
        end = time.monotonic() + STARVED_SECONDS
        while time.monotonic() < end:
            process.send_signal(signal.SIGSTOP)
            time.sleep(STOPPED_SECONDS)
            process.send_signal(signal.SIGCONT)
            time.sleep(RUNNING_SECONDS)
