"""Seconds and memory of the switches by which trainer and engine lend each other the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dsrl.observability.timeline import Span, no_span
from megatron_dsrl.platform import current_platform

GIB = 2**30


class MemorySwitches:
    """Measures named switches until their metrics are fetched.

    ```
    switches = MemorySwitches()
    with switches.measure("onload"):
        moved = ...
    switches.count("onload", moved)
    record |= switches.metrics()
    ```
    """

    def __init__(self, span: Span = no_span) -> None:
        """`span` records every switch in the timeline."""
        self._span = span
        self._metrics: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the block as part of the switch `name`: `memory/<name>_seconds`, of several blocks added up;
        `memory/<name>_gib`, what this process has on the device afterwards; `memory/<name>_peak_gib`, the most that it
        had there in between. The seconds are within those of a part of the step (`seconds/*`)."""
        platform = current_platform()
        platform.restart_peak_memory()
        started = time.perf_counter()
        with self._span(name):
            yield
        seconds, statistics = time.perf_counter() - started, platform.memory_statistics()
        self._add(f"memory/{name}_seconds", seconds)
        self._metrics[f"memory/{name}_gib"] = statistics.allocated_bytes / GIB
        peak = f"memory/{name}_peak_gib"
        self._metrics[peak] = max(self._metrics.get(peak, 0.0), statistics.recent_peak_bytes / GIB)

    def count(self, name: str, moved_bytes: int) -> None:
        """Add to `memory/<name>_moved_gib`, what the switch has moved."""
        self._add(f"memory/{name}_moved_gib", moved_bytes / GIB)

    def metrics(self) -> dict[str, float]:
        """Metrics of all switches since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _add(self, name: str, value: float) -> None:
        self._metrics[name] = self._metrics.get(name, 0.0) + value
