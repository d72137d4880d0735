"""Wall-clock seconds of the parts of one step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_dsrl.observability.timeline import Span, no_span


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
        """Add the time spent in the block to part `name`, also when it raises. Repeated parts add up.

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
