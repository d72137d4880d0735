"""Announce long work, so that no command is silent for long without saying why."""

import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_dsrl.common.process import launched_rank

REMINDER_SECONDS = 30.0
SHORT_SECONDS = 2.0
"""Shorter work does not get a line at its end."""


def say_on_first_rank(text: str) -> None:
    """Print a line once for all launched processes, even before they form a process group.

    On a terminal it breaks between words.
    """
    if launched_rank() != 0:
        return
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    print(text, flush=True)


@contextmanager
def waiting(
    what: str,
    hint: str = "",
    say: Callable[[str], None] = say_on_first_rank,
    reminder_seconds: float = REMINDER_SECONDS,
) -> Iterator[None]:
    """Announce a block of work, report every half minute that it is still running, and at its end how long it took.

    ```
    starting 1 engine (usually 15 s) ...
    starting 1 engine: done after 14 s
    ```

    `hint` says how long it usually takes, or where to look. `say` prints one line; another thread calls it too.
    """
    say(f"{what} ({hint}) ..." if hint else f"{what} ...")
    started, done = time.monotonic(), threading.Event()

    def remind() -> None:
        while not done.wait(reminder_seconds):
            say(f"{what}: not done after {time.monotonic() - started:.0f} s ...")

    reminder = threading.Thread(target=remind, daemon=True)
    reminder.start()
    try:
        yield
    finally:
        done.set()
        reminder.join()
    if (seconds := time.monotonic() - started) >= SHORT_SECONDS:
        say(f"{what}: done after {seconds:.0f} s")
