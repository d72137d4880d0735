"""Inject planned faults into a training, and make sure that it finishes."""

import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tools.fault_soak.fault import FAULTS, PREEMPTED, Fault, Moment
from tools.fault_soak.processes import launcher
from tools.fault_soak.schedule import PlannedFault
from tools.fault_soak.training import POLL_SECONDS, SoakFailure, Training

MAX_RESTARTS = 3
"""Starts in a row without a step."""


@dataclass
class Injection:
    """A planned fault and what came of it."""

    planned: PlannedFault
    fault: Fault
    time: float
    """Seconds since 1970, once it was applied. Meanwhile the run may have recorded a step, which says nothing about
    it."""
    step: int
    """The step in which it happened; 0 while the run started."""
    target: str
    outcome: list[str] = field(default_factory=list)
    seconds_to_next_step: float | None = None
    restarts: int = 0


class Soak:
    """One disturbed training."""

    def __init__(self, training: Training, plan: Sequence[PlannedFault], limit_seconds: float) -> None:
        """
        Args:
            training: not started yet.
            plan: in the order of steps.
            limit_seconds: for every wait, such as that for the next step.
        """
        self.injections: list[Injection] = []
        self._training = training
        self._plan = plan
        self._limit = limit_seconds
        self._finished = False

    def run(self) -> None:
        """Inject the faults that are reached before the training ends; returns when it has exited with status 0.

        Raises:
            SoakFailure: it hangs, ends with another status than documented, or something else is not as it must be.
        """
        self._training.start()
        for planned in self._plan:
            if self._reach(planned) and self._inject(planned):
                self._await_next_step(self.injections[-1])
        self._go_on_until(lambda: False)
        for injection in self.injections:
            if injection.fault.must_end and injection.seconds_to_next_step is not None and not injection.restarts:
                raise SoakFailure(f"{injection.planned.name} ({injection.target}) did not end the run")

    def _reach(self, planned: PlannedFault) -> bool:
        """Wait for the moment of a fault; False if the training ends before."""
        if planned.moment is Moment.START:
            return self._reach_start(planned)
        reached = self._go_on_until(lambda: self._is_at(planned))
        if reached:
            time.sleep(planned.delay_seconds)
        return reached

    def _is_at(self, planned: PlannedFault) -> bool:
        progress = self._training.progress()
        return progress.step >= planned.step and planned.moment in progress.parts

    def _reach_start(self, planned: PlannedFault) -> bool:
        """Unless the run is just starting, it is asked to stop, and started again."""
        training = self._training
        if not (planned.step == 1 and training.progress().step == 0):
            if not self._go_on_until(lambda: training.progress().step >= planned.step):
                return False
            for process in training.processes(launcher):
                process.send_signal(signal.SIGTERM)
            status = training.wait_for_end(self._limit)
            if status not in (0, PREEMPTED):
                raise SoakFailure(f"asked to stop, the run exited with status {status}:\n{training.tail()}")
            training.start()
        return not self._go_on_for(planned.delay_seconds)

    def _inject(self, planned: PlannedFault) -> bool:
        """Apply a fault as soon as it has a target; False if the training ends before."""
        fault = FAULTS[planned.name](random.Random(planned.seed))
        step, target = 0, None

        def apply() -> bool:
            nonlocal step, target
            step = self._training.progress().step
            target = fault.apply(self._training)
            if target is not None:
                self.injections.append(Injection(planned, fault, time.time(), step, target))
            return target is not None

        return self._go_on_until(apply)

    def _await_next_step(self, injection: Injection) -> None:
        """Wait until a step is recorded, however often the command must be started for it."""

        def recorded() -> bool:
            if injection.fault.must_end and not injection.restarts:
                return False  # the next fault must not come before a request to stop has taken effect
            return self._training.recorded_after(injection.time) is not None

        self._go_on_until(recorded)
        next_step = self._training.recorded_after(injection.time)
        if next_step is not None:
            injection.seconds_to_next_step = next_step - injection.time
        if not injection.outcome:
            injection.outcome.append("continued")
        if problem := injection.fault.problem(self._training):
            raise SoakFailure(f"{injection.planned.name} ({injection.target}): {problem}")

    def _go_on_until(self, what: Callable[[], bool]) -> bool:
        """Wait for something, and start the command again when it has ended; False if it ends with status 0 first.

        Raises:
            SoakFailure: like `run`.
        """
        deadline = time.monotonic() + self._limit
        while not self._finished and not what():
            if self._training.status() is not None:
                self._start_again(self._training.wait_for_end(self._limit))
                deadline = time.monotonic() + self._limit
            if time.monotonic() > deadline:
                raise SoakFailure(
                    f"nothing happened for {self._limit:g} s after {self._last()}:\n{self._training.tail()}"
                )
            time.sleep(POLL_SECONDS)
        return not self._finished

    def _go_on_for(self, seconds: float) -> bool:
        """Let this much time pass; whether the training has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._training.status() is not None:
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _start_again(self, status: int) -> None:
        """After an end that the last fault allows."""
        if status == 0:
            self._finished = True
            return
        last = self.injections[-1] if self.injections else None
        if last is None or status not in last.fault.statuses:
            raise SoakFailure(f"the run exited with status {status} after {self._last()}:\n{self._training.tail()}")
        if last.restarts == MAX_RESTARTS:
            raise SoakFailure(f"started {MAX_RESTARTS} times after {self._last()}:\n{self._training.tail()}")
        last.restarts += 1
        last.outcome.append(f"ended with {status}, resumed")
        last.fault.before_restart(self._training, status)
        self._training.start()

    def _last(self) -> str:
        if not self.injections:
            return "its start, before any fault"
        return f"{self.injections[-1].planned.name} ({self.injections[-1].target})"
