"""Live timeline of every rank and engine: `<run folder>/trace/rank_00000.jsonl`.

A rank writes one line when it enters a span and one when it leaves it, so that the file of a killed or hanging run says
where each rank was. Rank 0 also writes the calls to the engines, each when it ends. `dsrl trace` joins the files of all
ranks (report/trace_events.py).

Times are seconds since 1970 of the node's clock, so that ranks and nodes align as well as their clocks do. Within a
process they are that clock at its start plus a monotonic clock, and never run backwards.

The seconds of a step's parts, which its record has, are measured here too.
"""

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_dsrl.observability.records import repair_records

TRACE_FOLDER = "trace"
"""Within a run folder."""
_PROFILE = re.compile(r"profile_rank_(\d+)_step_(\d+)\.json\.gz")

logger = logging.getLogger(__name__)

Span = Callable[[str], AbstractContextManager[None]]
"""Opens a context that records its block under this name."""


@dataclass(frozen=True)
class EngineCall:
    """A request to an engine, with its time and outcome."""

    engine: int
    """Engine number."""
    prompts: tuple[int, ...]
    """Row numbers of the prompts in their set."""
    tokens: int
    """Response tokens returned."""
    attempt: int
    """Counted from 1."""
    outcome: str
    """`done`, `aborted`, `cancelled`, or the error."""
    started: float
    """On the monotonic clock, in seconds."""
    ended: float


def no_span(name: str) -> AbstractContextManager[None]:
    """A `Span` that records nothing."""
    return nullcontext()


def trace_file(run_folder: Path, rank: int) -> Path:
    """The timeline file of a rank, which it records to."""
    return run_folder / TRACE_FOLDER / f"rank_{rank:05d}.jsonl"


@dataclass(frozen=True)
class ProfileFile:
    """One rank's profile of one step."""

    rank: int
    step: int
    path: Path


def profile_file(run_folder: Path, rank: int, step: int) -> Path:
    """Where a rank's profile of a step is written."""
    return run_folder / TRACE_FOLDER / f"profile_rank_{rank:05d}_step_{step:06d}.json.gz"


def profile_files(run_folder: Path) -> list[ProfileFile]:
    """All profiles of a run, by rank and step."""
    paths = sorted((run_folder / TRACE_FOLDER).glob("profile_rank_*.json.gz"))
    found = ((_PROFILE.fullmatch(path.name), path) for path in paths)
    return [ProfileFile(int(match[1]), int(match[2]), path) for match, path in found if match]


class Timeline:
    """Appends to the file of one rank, from any thread. A context manager; before it is entered, it records nothing.

    A file that cannot be written ends the recording with a warning, not the run.
    """

    def __init__(self, run_folder: Path, rank: int, host: str, annotate: Span = no_span) -> None:
        """`annotate` opens a range of the device's own profiler around every span."""
        self._annotate = annotate
        self._epoch = time.time() - time.monotonic()
        self._file = trace_file(run_folder, rank)
        self._stream: TextIO | None = None
        self._lock = threading.Lock()
        self._started = {"event": "start", "rank": rank, "host": host}

    def __enter__(self) -> "Timeline":
        try:
            self._file.parent.mkdir(exist_ok=True)
            repair_records(self._file)
            self._stream = self._file.open("a", encoding="utf-8")
        except OSError as error:
            self._give_up(error)
        self._write(self._started | {"time": self._time(time.monotonic())})
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def start_step(self, step: int) -> None:
        """Assign the following events to this step, until the next one begins."""
        self._write({"event": "step", "step": step, "time": self._time(time.monotonic())})

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the block, even if it raises. Spans of a thread nest."""
        what = {"name": name, "thread": threading.current_thread().name}
        self._write({"event": "begin", **what, "time": self._time(time.monotonic())})
        try:
            with self._annotate(name):
                yield
        finally:
            self._write({"event": "end", **what, "time": self._time(time.monotonic())})

    def engine_call(self, call: EngineCall) -> None:
        """Record a call that has ended."""
        self._write(
            {
                "event": "call",
                "engine": call.engine,
                "time": self._time(call.started),
                "seconds": round(call.ended - call.started, 6),
                "prompts": list(call.prompts),
                "tokens": call.tokens,
                "attempt": call.attempt,
                "outcome": call.outcome,
            }
        )

    def _time(self, monotonic: float) -> float:
        return round(self._epoch + monotonic, 6)

    def _write(self, record: dict) -> None:
        line = json.dumps(record) + "\n"
        with self._lock:
            if self._stream is not None:
                try:
                    self._stream.write(line)
                    self._stream.flush()
                except OSError as error:
                    self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning("the timeline is no longer recorded: %s: %s", self._file, error)
        self._stream = None


class SecondsPerPart:
    """Measures named, non-overlapping parts of one step, from its construction on.

    ```
    timer = SecondsPerPart()
    with timer.part("generate"):
        ...
    record |= timer.metrics()   # {"seconds/generate": 8.1, "seconds/step": 8.2}
    ```
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, span: Span = no_span) -> None:
        self._clock = clock
        self._span = span
        self._started = clock()
        self._seconds: dict[str, float] = {}
        self._open_part: str | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to part `name`, even if it raises. Repeated parts add up.

        Parts do not nest, because the report stacks them and their sum must not exceed the step.
        """
        assert self._open_part is None, f"part {name} inside part {self._open_part}"
        assert name != "step", "seconds/step is the whole step"
        self._open_part = name
        entered = self._clock()
        try:
            with self._span(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - entered
            self._open_part = None

    def metrics(self) -> dict[str, float]:
        """`seconds/<part>` of every part, and `seconds/step` since construction."""
        parts = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        return parts | {"seconds/step": self._clock() - self._started}
