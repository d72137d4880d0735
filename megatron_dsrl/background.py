"""One piece of work in a thread beside the main one, whose result is waited for later."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Background(Generic[Value]):
    """Starts at once. The process does not wait for it when it ends."""

    def __init__(self, work: Callable[[], Value]) -> None:
        self._future: Future[Value] = Future()
        # A ThreadPoolExecutor's threads would be waited for at the end of a process that was asked to stop.
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def result(self) -> Value:
        """Wait for the work; signal handlers run meanwhile. What it raised is raised here."""
        return self._future.result()

    def _run(self, work: Callable[[], Value]) -> None:
        try:
            self._future.set_result(work())
        except BaseException as error:
            self._future.set_exception(error)
