"""Waiting for other processes."""

import time
from collections.abc import Callable


def wait_until(
    what: Callable[[], bool], seconds: float, explain: Callable[[], str] = str, pause_seconds: float = 0.02
) -> None:
    """Return when `what` is true, asked again after every pause.

    Raises:
        AssertionError: it is still false after `seconds`; with the text of `explain`.
    """
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, explain()
        time.sleep(pause_seconds)
