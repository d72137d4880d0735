#!/usr/bin/env python3
"""Time and size of recording a step's rollouts: orjson (which runs use), `json` and gzip, on the same samples.

The last column is the longest time for which another thread of the process was blocked.
"""

import argparse
import gzip
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.recording import write_groups
from megatron_dsrl.rollout.sample import Sample, SampleGroup


def random_groups(prompts: int, samples: int, tokens: int) -> list[SampleGroup]:
    """Random groups of the size of a real step's."""
    chance = random.Random(0)

    def sample() -> Sample:
        ids = tuple(chance.randrange(151_000) for _ in range(tokens))
        log_probs = tuple(-chance.expovariate(3) for _ in range(tokens))
        return Sample(ids, log_probs, "so x = 2, " * (tokens // 3), "stop", 1, 1.0)

    prompt_ids = tuple(range(200))
    return [
        SampleGroup(Prompt(i, "Solve it.", prompt_ids, "2"), tuple(sample() for _ in range(samples)))
        for i in range(prompts)
    ]


def measure(write: Callable[[], object]) -> tuple[float, float]:
    """Duration of a writing thread in seconds, and the longest time for which it blocked this thread."""
    thread = threading.Thread(target=write)
    longest, pause = 0.0, 0.001
    started = last = time.perf_counter()
    thread.start()
    while thread.is_alive():
        time.sleep(pause)
        now = time.perf_counter()
        longest, last = max(longest, now - last - pause), now
    return last - started, longest


def with_json(file: Path, groups: Sequence[SampleGroup]) -> None:
    """The standard library's encoder."""
    with open(file, "w", encoding="utf-8") as stream:
        for group in groups:
            stream.write(json.dumps(asdict(group), ensure_ascii=False) + "\n")


def with_gzip(file: Path, groups: Sequence[SampleGroup]) -> None:
    """gzip at the fastest compression level."""
    with gzip.open(file, "wb", compresslevel=1) as stream:
        for group in groups:
            stream.write(orjson.dumps(group) + b"\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=128, help="groups per step (default: 128)")
    parser.add_argument("--samples", type=int, default=8, help="samples per group (default: 8)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per sample (default: 8192)")
    options = parser.parse_args()
    groups = random_groups(options.prompts, options.samples, options.tokens)
    table = Table("", "seconds", "MB", "others wait (ms)", box=None)
    writers = {"json": with_json, "orjson, flushed to disk (used)": write_groups, "orjson + gzip -1": with_gzip}
    with tempfile.TemporaryDirectory(prefix="recording-benchmark-") as folder:
        for name, write in writers.items():
            file = Path(folder) / "groups"
            seconds, longest = measure(lambda: write(file, groups))  # noqa: B023
            table.add_row(name, f"{seconds:.2f}", f"{file.stat().st_size / 1e6:.0f}", f"{longest * 1000:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
