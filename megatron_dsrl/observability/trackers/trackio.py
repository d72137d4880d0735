"""Trackio: a database on this machine (`trackio show`), your own server, or a Hugging Face Space."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from megatron_dsrl.config.choices import TRACKERS
from megatron_dsrl.observability.trackers.base import RESPONSE_COLUMNS, Status, TrackedRun, TrackerOptions, TrackerRun


@TRACKERS.register
class TrackioTracker(TrackerOptions):
    """Options of `trackio.init`. If an option is null, the package's environment variable applies."""

    name: Literal["trackio"] = "trackio"
    package: ClassVar[str] = "trackio"

    project: str = "megatron-dsrl"
    """The project."""

    group: str | None = None
    """Groups runs, such as the seeds of one method."""

    space_id: str | None = None
    """Hugging Face Space, such as you/experiments; null: TRACKIO_SPACE_ID, else the database on this machine."""

    def open(self, run: TrackedRun) -> TrackerRun:
        """Trackio finds a run by its name, so the name ends in the id."""
        import trackio

        opened = trackio.init(
            project=self.project,
            name=f"{run.name}-{run.id}",
            group=self.group,
            space_id=self.space_id,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=None if run.training_process is not None else False,
            auto_log_cpu=None if run.training_process is not None else False,
        )
        return TrackioRun(opened)


class TrackioRun(TrackerRun):
    """A Trackio run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float], time: float | None) -> None:
        self._run.log(dict(metrics), step=step)

    def log_responses(self, step: int, evaluation_set: str, rows: Sequence[Sequence[Any]]) -> None:
        import trackio

        table = trackio.Table(columns=list(RESPONSE_COLUMNS), data=[list(row) for row in rows])
        self._run.log({f"evaluation/{evaluation_set}/responses": table}, step=step)

    def finish(self, status: Status) -> None:
        self._run.finish()
