"""The process of one tracker: it follows the records of a run folder and sends them.

A process rather than a thread, because the packages of trackers take the interpreter's lock for seconds when they are
imported, wait without a limit for a network that is down, and keep waiting when the interpreter exits. `launch.py`
starts it. It reads its request, and later how the run ended, from standard input, and writes what users should read to
standard output, a line each. Everything else that is printed goes to the tracker's log.
"""

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from megatron_dsrl.config.choices import TRACKERS
from megatron_dsrl.observability.trackers.base import Status, TrackerOptions, reason
from megatron_dsrl.observability.trackers.cursor import InUse, log_file
from megatron_dsrl.observability.trackers.sender import Sender

POLL_SECONDS = 1.0
RETRY_SECONDS = 30.0
"""Pause after a failed attempt."""
ATTEMPTS_AT_THE_END = 2
EXIT_SECONDS = 5.0
"""Time for what packages do when the interpreter exits, after everything was sent."""
SLOW_CALL_SECONDS = 120.0
"""A tracker that has not answered for this long is reported."""


class Following:
    """Sends one run folder to one tracker until the training has ended and everything is sent."""

    def __init__(self, run_folder: Path, options: TrackerOptions, training: "Training", messages: "Messages") -> None:
        self._folder = run_folder
        self._options = options
        self._training = training
        self._messages = messages
        self._sender: Sender | None = None
        self._in_use = False
        """Whether another process is sending to the same destination, such as that of a training just killed."""

    def run(self) -> bool:
        """Whether everything was sent. The training's watch ends this process if a tracker does not answer."""
        retry_at = 0.0
        while self._training.ended is None:
            if time.monotonic() >= retry_at and not self._attempt(None):
                retry_at = time.monotonic() + (POLL_SECONDS if self._in_use else RETRY_SECONDS)
            self._training.wait(POLL_SECONDS)
        while self._in_use and self._training.ended != "interrupted":
            time.sleep(POLL_SECONDS)
            self._attempt(None)
        if self._in_use:  # by the training's next start, which sends the rest
            return True
        return any(self._attempt(self._training.ended) for _ in range(ATTEMPTS_AT_THE_END))

    def _attempt(self, ended: Status | None) -> bool:
        """Open the run and send what is new, and finish if the training has ended; False if that failed."""
        self._in_use = False
        try:
            with self._messages.slow_calls_reported():
                if self._sender is None:
                    self._sender = Sender(self._folder, self._options, self._training.process)
                self._sender.open()
                self._messages.url(self._sender.url)
                self._sender.send_new()
                if ended is not None:
                    self._sender.finish(ended)
        except InUse:
            self._in_use = True
            return False
        except Exception as error:
            self._messages.failed(error)
            return False
        return True


class Training:
    """Watches the process that started this one, in a thread: a tracker may never answer."""

    def __init__(self, stream: BinaryIO, finish_seconds: float) -> None:
        """
        Args:
            stream: standard input, unbuffered.
            finish_seconds: this long after the end of the training, this process ends regardless.
        """
        self.process = os.getppid()
        self.ended: Status | None = None
        """How it ended; None while it runs. A process that disappeared without a message was interrupted."""
        self._stream = stream
        self._has_ended = threading.Event()
        self._limit = threading.Timer(finish_seconds, os._exit, [1])
        self._limit.daemon = True
        threading.Thread(target=self._watch, daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Wait for its end, with a limit."""
        self._has_ended.wait(seconds)

    def everything_is_sent(self) -> None:
        """Let the interpreter exit; the time that packages take then is limited as well."""
        self._limit.cancel()
        limit = threading.Timer(EXIT_SECONDS, os._exit, [0])
        limit.daemon = True
        limit.start()

    def _watch(self) -> None:
        readable: list[Any] = []
        # Forked children of a training that was killed may keep the pipe open.
        while not readable and os.getppid() == self.process:
            readable = select.select([self._stream], [], [], POLL_SECONDS)[0]
        word = self._stream.readline().decode().strip() if readable else ""
        self._limit.start()
        self.ended = word if word in ("finished", "failed") else "interrupted"  # type: ignore[assignment]
        self._has_ended.set()


class Messages:
    """Lines for the user, each kind once."""

    def __init__(self, stream: TextIO, options: TrackerOptions, run_folder: Path) -> None:
        self._stream = stream
        self._name = options.name
        self._log = log_file(run_folder, options)
        self._said: set[str] = set()

    def url(self, url: str | None) -> None:
        """The web address of the run."""
        if url is not None:
            self._once("url", f"tracker {self._name}: {url}")

    def failed(self, error: Exception) -> None:
        """The tracker has raised; the traceback goes to the log."""
        traceback.print_exception(error, file=sys.stderr)
        text = f"warning: tracker {self._name} failed ({reason(error)}); the run continues, see {self._log}"
        self._once("failed", text)

    def everything_is_sent(self) -> None:
        """Take back a warning."""
        if "failed" in self._said:
            self._once("sent", f"tracker {self._name} has now received everything")

    @contextmanager
    def slow_calls_reported(self) -> Iterator[None]:
        """Report when the block takes unusually long."""
        problem = f"has not answered for {SLOW_CALL_SECONDS:g} s"
        text = f"warning: tracker {self._name} {problem}; the run continues, see {self._log}"
        timer = threading.Timer(SLOW_CALL_SECONDS, lambda: self._once("failed", text))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _once(self, kind: str, text: str) -> None:
        """Write a line unless one of this kind was written."""
        if kind not in self._said:
            self._said.add(kind)
            try:
                print(text, file=self._stream, flush=True)
            except OSError:  # the training is gone
                pass


def main() -> None:
    """Follow what the first line of standard input names: {"run_folder": ..., "tracker": options}."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the training gets them too, and tells this process
    stream = os.fdopen(os.dup(0), "rb", buffering=0)
    request = json.loads(stream.readline())
    run_folder, options = Path(request["run_folder"]), TRACKERS.build(request["tracker"])
    assert isinstance(options, TrackerOptions)
    messages = Messages(os.fdopen(os.dup(1), "w"), options, run_folder)
    redirect_output(log_file(run_folder, options))
    training = Training(stream, options.finish_seconds)
    if not Following(run_folder, options, training, messages).run():
        sys.exit(1)
    messages.everything_is_sent()
    training.everything_is_sent()


def redirect_output(file: Path) -> None:
    """Send what packages print to a file, and leave them no input to wait for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


if __name__ == "__main__":
    main()
