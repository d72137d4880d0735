"""SwanLab. Needs SWANLAB_API_KEY or `swanlab login`, unless the mode is local or offline."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from megatron_dsrl.config.choices import TRACKERS
from megatron_dsrl.observability.trackers.base import RESPONSE_COLUMNS, Status, TrackedRun, TrackerOptions, TrackerRun

DEFAULT_PROJECT = "megatron-dsrl"


@TRACKERS.register
class SwanlabTracker(TrackerOptions):
    """Options of `swanlab.init`. If an option is null, the package's environment variable applies."""

    name: Literal["swanlab"] = "swanlab"
    package: ClassVar[str] = "swanlab"

    project: str | None = None
    """null: SWANLAB_PROJ_NAME, else megatron-dsrl."""

    workspace: str | None = None
    """User or organisation; null: SWANLAB_WORKSPACE, else your own."""

    group: str | None = None
    """Groups runs, such as the seeds of one method."""

    tags: list[str] = Field(default_factory=list)
    """Tags of the run."""

    mode: Literal["online", "local", "offline"] | None = None
    """`local` and `offline` only write to `<run folder>/swanlog`, one part per start of the run. null: SWANLAB_MODE,
    else online."""

    def open(self, run: TrackedRun) -> TrackerRun:
        """Runs are identified by their id; SwanLab continues one that it knows when it is online."""
        import swanlab

        opened = swanlab.init(
            project=self._project(),
            workspace=self.workspace,
            name=run.name,
            group=self.group,
            tags=self.tags,
            mode=self.mode,
            log_dir=str(run.folder / "swanlog"),
            config=dict(run.config),
            id=run.id,
            **({"resume": "allow"} if self._mode() == "online" else {}),
        )
        return SwanlabRun(opened, opened.url if self._mode() == "online" else None)

    def destination(self) -> dict[str, Any]:
        """Workspace, project and mode."""
        workspace = self.workspace or os.environ.get("SWANLAB_WORKSPACE")
        return {"workspace": workspace, "project": self._project(), "mode": self._mode()}

    def _project(self) -> str:
        return self.project or os.environ.get("SWANLAB_PROJ_NAME") or DEFAULT_PROJECT

    def _mode(self) -> str:
        return self.mode or os.environ.get("SWANLAB_MODE", "online")


class SwanlabRun(TrackerRun):
    """A SwanLab run."""

    def __init__(self, run: Any, url: str | None) -> None:
        self._run = run
        self.url = url

    def log(self, step: int, metrics: Mapping[str, float], time: float | None) -> None:
        self._run.log(dict(metrics), step=step)

    def log_responses(self, step: int, evaluation_set: str, rows: Sequence[Sequence[Any]]) -> None:
        import swanlab

        table = swanlab.echarts.Table()
        table.add(list(RESPONSE_COLUMNS), [[str(value) for value in row] for row in rows])
        self._run.log({f"evaluation/{evaluation_set}/responses": table}, step=step)

    def finish(self, status: Status) -> None:
        self._run.finish(*(["crashed", status] if status in ("failed", "interrupted") else []))
