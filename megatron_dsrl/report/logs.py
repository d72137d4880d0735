"""The last lines of the logs in a run folder: of the engines and of the SLURM job's attempts."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

FOLDERS = {"engines": "SGLang server", "slurm": "SLURM job"}
"""Folders of logs, and whose they are."""

LAST_LINES = 30
LAST_BYTES = 64 * 1024
MAX_LINE_CHARACTERS = 300
MAX_LOGS = 8
"""Of each folder, the ones that were written last."""

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class LogEnd:
    """The end of one log."""

    name: str
    """Its path in the run folder."""
    whose: str
    written: str
    """Date and time in UTC."""
    text: str


def log_ends(run_folder: Path) -> list[LogEnd]:
    """Of all logs that there are, up to `MAX_LOGS` of each folder, by name."""
    ends = []
    for folder, whose in FOLDERS.items():
        files = sorted((run_folder / folder).glob("*.log"), key=lambda file: file.stat().st_mtime)[-MAX_LOGS:]
        ends += [_end(file, f"{folder}/{file.name}", whose) for file in sorted(files)]
    return ends


def _end(file: Path, name: str, whose: str) -> LogEnd:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - LAST_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    lines = [_plain(line) for line in text.split("\n") if line.strip()]
    written = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    return LogEnd(name, whose, f"{written:%Y-%m-%d %H:%M} UTC", "\n".join(lines[-LAST_LINES:]))


def _plain(line: str) -> str:
    """Without terminal codes; of a progress bar what stood there last; not longer than a page bears."""
    shown = _TERMINAL_CODES.sub("", line.rstrip("\r").rsplit("\r", 1)[-1])
    return shown if len(shown) <= MAX_LINE_CHARACTERS else shown[:MAX_LINE_CHARACTERS] + " …"
