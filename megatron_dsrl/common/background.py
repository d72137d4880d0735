"""Work in daemon threads."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Value = TypeVar("Value")


def in_background(work: Callable[[], Value]) -> "Future[Value]":
    """Start `work` in a daemon thread. Signal handlers still run while the future is awaited.

    Unlike the threads of a ThreadPoolExecutor, a daemon thread does not delay the exit of a process asked to stop.
    """

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    future: Future[Value] = Future()
    threading.Thread(target=run, daemon=True).start()
    return future
