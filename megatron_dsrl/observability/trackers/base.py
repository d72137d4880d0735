"""Interface of an experiment tracker: options in the configuration, and a run at the tracking service.

Your own tracker is a subclass of `TrackerOptions`, named in the configuration by its dotted path:

    class Printed(TrackerOptions):
        prefix: str = ""

        def open(self, run: TrackedRun) -> TrackerRun:
            return PrintedRun(self.prefix)

Each tracker runs in a separate process (`process.py`), so it may block, raise or crash without stopping the training.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.registry import Options

Status = Literal["finished", "failed", "interrupted", "running"]
"""How a run ended. An `interrupted` run (preempted, killed) will be resumed; a `running` one has not ended."""

RESPONSE_COLUMNS = ("prompt", "response", "answer", "reward")
"""Columns of the table of responses."""


@dataclass(frozen=True)
class TrackedRun:
    """The run to start or continue at the service."""

    id: str
    """Eight hexadecimal digits that stay the same however often the run is resumed."""
    name: str
    folder: Path
    config: Mapping[str, Any]
    """The resolved configuration, with `phase_schedule` (name, first_step and last_step of every phase) and, where it
    is recorded, `provenance`."""
    training_process: int | None
    """Process whose resources the tracker may watch; None when a run folder is uploaded."""


class TrackerRun(ABC):
    """One run at the service. Methods may block and raise; a call that raised is repeated later."""

    url: str | None = None
    """Web address of the run."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float], time: float | None) -> None:
        """Send the numbers of a step, or of an evaluation after it. Steps never decrease.

        Args:
            step: training step; 0 is before the first.
            time: when they were recorded, in seconds since 1970; None if the record does not say.
        """

    @abstractmethod
    def log_responses(self, step: int, evaluation_set: str, rows: Sequence[Sequence[Any]]) -> None:
        """Send some responses of an evaluation: one row per response with the values of `RESPONSE_COLUMNS`."""

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Send what is still pending and close the run, which may be resumed later."""


class TrackerOptions(Options):
    """Base of trackers: the fields are the options, `open` begins or continues the run."""

    package: ClassVar[str | None] = None
    """Importable name of the package that the tracker needs."""
    requirement: ClassVar[str | None] = None
    """Name of the package for pip; None: `package`."""

    finish_seconds: float = Field(default=60.0, gt=0)
    """How long the end of a run waits for data that is still being sent. `dsrl upload` sends the rest."""

    @abstractmethod
    def open(self, run: TrackedRun) -> TrackerRun:
        """Start the run at the service, or resume the one that was started with the same `run.id`."""

    def destination(self) -> dict[str, Any]:
        """The options that decide which run at which service receives the records. What was sent is remembered for
        each destination. By default all options but `finish_seconds`."""
        return self.model_dump(mode="json", exclude={"finish_seconds"})


def reason(error: Exception) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def check_packages(trackers: Sequence[Options], field: str = "observability.trackers") -> None:
    """Raise UserError if the package of a tracker is not installed."""
    for tracker in trackers:
        assert isinstance(tracker, TrackerOptions)
        if tracker.package is not None and find_spec(tracker.package) is None:
            raise UserError(
                f"{field}: {tracker.name} needs the package {tracker.package}, which is not installed: "
                f"pip install {tracker.requirement or tracker.package}"
            )
