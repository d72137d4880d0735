"""What a tracker has received of a run, kept in the run folder: `trackers/<name>-<destination>.json`.

A run that is started again, and every `dsrl upload`, continue the same run at the service after the last record that it
has. Steps that a resumed run repeats are not sent again.
"""

import fcntl
import hashlib
import json
import re
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_dsrl.common.disk import replace_text
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.trackers.base import TrackerOptions

TRACKERS_FOLDER = "trackers"


class InUse(Exception):
    """Another process is sending the run to the same destination."""


@dataclass
class Sent:
    """What was sent so far."""

    run_id: str = field(default_factory=lambda: secrets.token_hex(4))
    last_step: int = 0
    """The last step whose record was sent."""
    evaluations: dict[str, int] = field(default_factory=dict)
    """Last step whose evaluation was sent, by set."""


class Cursor:
    """The file of one destination. Only one process at a time has it open."""

    def __init__(self, run_folder: Path, options: TrackerOptions) -> None:
        """
        Raises:
            InUse: another process has it open.
            UserError: the file is damaged.
            OSError: the folder cannot be written to.
        """
        self._destination = options.destination()
        self._stem = run_folder / TRACKERS_FOLDER / _file_name(options.name, self._destination)
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._stem.with_suffix(".lock"), "a", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise InUse from error
        except OSError:
            pass  # a file system without locks
        self.sent = self._read()
        self.save()

    @property
    def file(self) -> Path:
        """File that holds this state."""
        return self._stem.with_suffix(".json")

    def save(self) -> None:
        """Write it; a crash leaves either the old content or the new one."""
        replace_text(self.file, json.dumps({**asdict(self.sent), "destination": self._destination}) + "\n")

    def close(self) -> None:
        """Let other processes open it."""
        self._lock.close()

    def _read(self) -> Sent:
        if not self.file.exists():
            return Sent()
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            return Sent(kept["run_id"], kept["last_step"], kept["evaluations"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} is damaged ({error!r}); remove it to send the run from the start") from error


def log_file(run_folder: Path, options: TrackerOptions) -> Path:
    """Log file of a tracker's process."""
    return run_folder / TRACKERS_FOLDER / f"{_file_name(options.name, options.destination())}.log"


def _file_name(tracker: str, destination: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(destination, sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', tracker)}-{digest}"
