"""Sends a run folder to trackers after the fact: `dsrl upload`."""

import sys
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.choices import TRACKERS
from megatron_dsrl.config.load import apply_override
from megatron_dsrl.observability.run_records import read_run
from megatron_dsrl.observability.trackers.base import TrackerOptions, check_packages, reason
from megatron_dsrl.observability.trackers.cursor import InUse
from megatron_dsrl.observability.trackers.sender import Sender


def chosen_trackers(run_folder: Path, names: Sequence[str], overrides: Sequence[str]) -> list[TrackerOptions]:
    """The trackers with these names and options; without names those of the run's own configuration. Raises UserError
    if the run, a tracker or an option does not exist, no tracker is named, or a package is not installed.

    Args:
        names: registered names or dotted paths.
        overrides: `option=value`, for all of them.
    """
    configured = read_run(run_folder).config.get("observability", {}).get("trackers", [])
    of_run = {tracker["name"]: tracker for tracker in configured}
    wanted = [of_run.get(name, {"name": name}) for name in names] or configured
    if not wanted:
        raise UserError(f"{run_folder} has no observability.trackers; name one, such as --to wandb")
    trackers = [_tracker(dict(options), overrides) for options in wanted]
    check_packages(trackers, field="--to")
    return trackers


def upload(run_folder: Path, tracker: TrackerOptions) -> str:
    """Send what the tracker does not have yet, and return a line that says what was sent. Raises UserError if the
    tracker failed, or another process is sending the run to it."""
    run = read_run(run_folder)
    has_ended = bool(run.steps) and run.steps[-1]["step"] == run.total_steps
    try:
        with closing(Sender(run_folder, tracker)) as sender:
            if not sender.has_news():
                return f"{tracker.name}: nothing new to send"
            with redirect_stdout(sys.stderr):  # packages print there
                sender.send_new()
                sender.finish("finished" if has_ended else "running")
    except InUse as error:
        raise UserError(
            f"{run_folder} is being sent to {tracker.name} by another process, such as its training; let that finish"
        ) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{tracker.name} failed ({reason(error)}); run the same command again to continue") from error
    where = f" at {sender.url}" if sender.url else ""
    sent = f"sent {sender.steps} steps and {sender.evaluations} evaluations"
    return f"{tracker.name}: {sent} to run {sender.run_id}{where}"


def _tracker(options: dict[str, Any], overrides: Sequence[str]) -> TrackerOptions:
    name = options["name"]
    for override in overrides:
        apply_override(options, override, {})
    try:
        built = TRACKERS.build(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"--to {name}: {where}{': ' * bool(where)}{_what(first)}") from error
    assert isinstance(built, TrackerOptions)
    return built


def _what(error: Any) -> str:
    """Pydantic's message, or a better one for common mistakes."""
    if error["type"] == "union_tag_invalid":
        return f"no such tracker; use one of {', '.join(TRACKERS.names())} or a path `package.module:Class`"
    return "this tracker has no such option" if error["type"] == "extra_forbidden" else error["msg"]
