"""Warnings and errors in the logs of a run folder: of the engines and of the SLURM job's attempts.

Messages that every healthy run prints and that need no action are counted and left out.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

MAX_MESSAGES = 20
"""Number of last messages shown per log."""
LAST_LINES = 30
READ_BYTES = 2 * 1024 * 1024
"""Bytes read from the end of each log."""
MAX_LINE_CHARACTERS = 300
MAX_MESSAGE_LINES = 40
MAX_LOGS = 8
"""Number of logs shown per folder, the most recently written ones."""


@dataclass(frozen=True)
class _Folder:
    name: str
    source: str
    """The program that writes its logs."""
    alarm: re.Pattern[str] | None
    """Matches warnings and errors; None if every message is one."""


_FOLDERS = (
    _Folder("engines", "SGLang server", None),  # their log level is `warning`
    _Folder(
        "slurm",
        "SLURM job",
        re.compile(
            r"Traceback|\w*(?:Error|Exception|Warning)\b|(?i:\b(?:errors?|warn(?:ing)?|critical|fatal|fail(?:ed|ure)?"
            r"|killed|aborted|terminate|segmentation fault|out of memory|oom|nan|timeouts?|timed out|cancelled)\b)"
        ),
    ),
)

_HARMLESS = {
    "models of other families that this machine cannot load": r"Ignore import error when loading sglang\.srt\.models\.",
    "what a CPU does not have": (
        r"Only CUDA, .* support \w+ quantization|Only CUDA, .* support AWQ|Triton is not supported on current platform"
        r"|Cuda graph is disabled because|init_cpu_threads_env|Cannot detect CUDA architecture"
    ),
    "optional kernels that are not installed": r"(?:Transformer Engine|Apex)\b.* (?:not|isn't) installed",
    "parts of SGLang's server that a run does not use": (
        r"No HuggingFace chat template found|token IDs (?:dynamically|for yes/no)|OpenAI Responses API"
        r"|ORJSONResponse is deprecated"
    ),
    "SGLang's request to freeze garbage collection before its port is open": r"/freeze_gc|freeze_gc failed",
    "limits and resources at start and shutdown": r"Fail to set RLIMIT_NOFILE|leaked semaphore objects",
    "progress of loading weights": r"loading (?:safetensors checkpoint )?shards:",
}
"""Topic and text of a message."""

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("The above exception was the direct cause", "During handling of the above exception")


@dataclass(frozen=True)
class LogView:
    """The part of a log that the report shows."""

    name: str
    """Its path in the run folder."""
    source: str
    """The program that wrote it."""
    written: str
    """Date and time in UTC."""
    alarms: tuple[str, ...]
    """Warnings and errors, the last `MAX_MESSAGES`; a traceback is one."""
    alarm_count: int
    """Number of warnings and errors in the part that was read."""
    end: str
    """The last lines, where not every line of such a log is a warning."""
    harmless: dict[str, int]
    """Messages left out, by what they are about."""


def log_views(run_folder: Path) -> list[LogView]:
    """All logs, up to `MAX_LOGS` of each folder, by name."""
    views = []
    for folder in _FOLDERS:
        files = sorted((run_folder / folder.name).glob("*.log"), key=lambda file: file.stat().st_mtime)[-MAX_LOGS:]
        views += [_view(file, folder) for file in sorted(files)]
    return views


def _view(file: Path, folder: _Folder) -> LogView:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - READ_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    harmless: Counter[str] = Counter()
    kept = []
    for message in messages([_plain(line) for line in text.split("\n") if line.strip()]):
        if about := _harmless(message):
            harmless[about] += 1
        else:
            kept.append(message)
    alarms = [message for message in kept if folder.alarm is None or folder.alarm.search("\n".join(message))]
    end = [line for message in kept for line in message][-LAST_LINES:] if folder.alarm else []
    written = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    return LogView(
        f"{folder.name}/{file.name}",
        folder.source,
        f"{written:%Y-%m-%d %H:%M} UTC",
        tuple("\n".join(message[-MAX_MESSAGE_LINES:]) for message in alarms[-MAX_MESSAGES:]),
        len(alarms),
        "\n".join(end),
        dict(harmless.most_common()),
    )


def messages(lines: Sequence[str]) -> list[list[str]]:
    """Lines that belong together, from lines without empty ones: a traceback with what led to it and the line before, a
    warning with its source line."""
    grouped: list[list[str]] = []
    in_traceback = False
    for line in lines:
        is_chained = line.startswith(_CHAINED)
        is_start = line.startswith(_TRACEBACK)
        if grouped and (in_traceback or is_chained or is_start or line.startswith((" ", "\t"))):
            grouped[-1].append(line)
        else:
            grouped.append([line])
        # The exception itself ends a traceback: the first line that is not indented.
        in_traceback = is_start or is_chained or (in_traceback and line.startswith((" ", "\t")))
    return grouped


def _harmless(message: Sequence[str]) -> str | None:
    """Topic of a message that needs no action; None for other messages."""
    text = "\n".join(message)
    return next((about for about, pattern in _HARMLESS.items() if re.search(pattern, text, re.IGNORECASE)), None)


def _plain(line: str) -> str:
    """The line without terminal codes, without what a progress bar showed before, and cut to a length that a page can
    show."""
    shown = _TERMINAL_CODES.sub("", line.rstrip("\r").rsplit("\r", 1)[-1])
    return shown if len(shown) <= MAX_LINE_CHARACTERS else shown[:MAX_LINE_CHARACTERS] + " …"
