"""Reward functions for tests of the pool; they run in its workers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fractions import Fraction


def response_length(response: str, answer: str) -> float:
    return float(len(response.split()))


def endless(response: str, answer: str) -> float:
    if response == "hang":
        while True:
            pass
    return 1.0


def misbehaving(response: str, answer: str, weight: float = 1.0) -> object:
    outcomes = {"nan": float("nan"), "none": None, "text": "1.0", "true": True, "weight": weight}
    if response == "raise":
        raise KeyError("no such thing")
    if response == "die":
        os._exit(3)
    if response == "sleep":
        time.sleep(0.2)
    return outcomes.get(response, 0.25)


def killed_once(response: str, answer: str) -> float:
    """Its worker gets `kill -9`, which is not the response's fault; `answer` is a file that remembers it."""
    if not os.path.exists(answer):
        open(answer, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def hungry(response: str, answer: str) -> float:
    return float(len(bytearray(2**30 if response == "hungry" else 1)) == 1)


def has_torch(response: str, answer: str) -> float:
    return float("torch" in sys.modules)


def even_length(response: str, answer: str) -> float:
    return float(len(response) % 2 == 0)


class Unpicklable(Exception):
    """Like `httpx.HTTPStatusError`: it can be pickled, but not unpickled."""

    def __init__(self, message: str, *, response: int) -> None:
        super().__init__(message)
        self.response = response


class Explosive(float):
    """A number that raises when another process reads it."""

    def __reduce__(self) -> tuple:
        return (_explode, ())


def _explode() -> None:
    raise RuntimeError("not in this process")


def strange(response: str, answer: str) -> object:
    import numpy as np

    if response == "unpicklable":
        raise Unpicklable("429", response=1)
    if response == "exit":
        raise SystemExit(3)
    if response == "exit with 0":
        os._exit(0)
    if response == "stop":
        raise StopIteration
    outcomes = {
        "explosive": Explosive(0.5),
        "dict": {"score": 1.0},
        "float32": np.float32(0.25),
        "int64": np.int64(1),
        "bool": np.bool_(True),
        "array": np.ones(1),
        "complex": 1j,
        "large": 1e300,
    }
    return outcomes.get(response, 1.0)


def slow(response: str, answer: str) -> float:
    time.sleep(2)
    return 1.0


_loops: set[int] = set()


async def remote(response: str, answer: str, share: Fraction | float = 1.0) -> float:
    """Fails if a call has a different event loop than the previous one, as a client with open connections would."""
    _loops.add(id(asyncio.get_running_loop()))
    await asyncio.sleep(0)
    if response == "raise" or len(_loops) > 1:
        raise ConnectionError("no server")
    return float(share)


def of_trl(completions: list[str], **columns: object) -> list[float]:
    return [1.0 for _ in completions]
