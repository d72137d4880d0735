"""Work in a thread beside the main one, whose result is waited for later."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Value = TypeVar("Value")


def in_background(work: Callable[[], Value]) -> "Future[Value]":
    """Start `work` in a daemon thread. The future has its result or its exception; waiting lets signal handlers run.

    The threads of a ThreadPoolExecutor would delay the exit of a process that was asked to stop; these do not.
    """

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    future: Future[Value] = Future()
    threading.Thread(target=run, daemon=True).start()
    return future
