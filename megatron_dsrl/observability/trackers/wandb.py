"""Weights & Biases. Needs WANDB_API_KEY or `wandb login`, unless the mode is offline."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from megatron_dsrl.config.choices import TRACKERS
from megatron_dsrl.observability.trackers.base import RESPONSE_COLUMNS, Status, TrackedRun, TrackerOptions, TrackerRun

DEFAULT_PROJECT = "megatron-dsrl"


@TRACKERS.register
class WandbTracker(TrackerOptions):
    """Options of `wandb.init`. If an option is null, the package's environment variable applies."""

    name: Literal["wandb"] = "wandb"
    package: ClassVar[str] = "wandb"

    project: str | None = None
    """null: WANDB_PROJECT, else megatron-dsrl."""

    entity: str | None = None
    """User or team; null: WANDB_ENTITY, else your default one."""

    group: str | None = None
    """Groups runs, such as the seeds of one method; null: WANDB_RUN_GROUP, else none."""

    tags: list[str] = Field(default_factory=list)
    """Tags of the run."""

    mode: Literal["online", "offline"] | None = None
    """`offline` writes to `<run folder>/wandb` only. null: WANDB_MODE, else online."""

    def open(self, run: TrackedRun) -> TrackerRun:
        """Runs are identified by their id; W&B continues one that it knows."""
        import wandb

        watching = run.training_process is not None
        settings = wandb.Settings(console="off", x_disable_stats=not watching, x_disable_meta=not watching, silent=True)
        if watching:
            settings.x_stats_pid = run.training_process
        opened = wandb.init(
            project=self._project(),
            entity=self.entity,
            group=self.group,
            tags=self.tags,
            mode=self.mode,
            id=run.id,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.config),
            allow_val_change=True,
            resume="allow",
            settings=settings,
        )
        return WandbRun(opened)

    def destination(self) -> dict[str, Any]:
        """Service, project and mode."""
        return {
            "service": os.environ.get("WANDB_BASE_URL"),
            "entity": self.entity or os.environ.get("WANDB_ENTITY"),
            "project": self._project(),
            "mode": self.mode or os.environ.get("WANDB_MODE", "online"),
        }

    def _project(self) -> str:
        return self.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT


class WandbRun(TrackerRun):
    """A W&B run. Its steps are the training's."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.url = run.url or None

    def log(self, step: int, metrics: Mapping[str, float], time: float | None) -> None:
        self._run.log(dict(metrics), step=step)

    def log_responses(self, step: int, evaluation_set: str, rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        table = wandb.Table(columns=list(RESPONSE_COLUMNS), data=[list(row) for row in rows])
        self._run.log({f"evaluation/{evaluation_set}/responses": table}, step=step)

    def finish(self, status: Status) -> None:
        if status == "interrupted":
            self._run.mark_preempting()
        self._run.finish(exit_code=int(status in ("failed", "interrupted")))
