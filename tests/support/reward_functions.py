"""Reward functions for tests of the pool; they run in its workers."""

import os
import signal
import sys
import time


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
    """Its worker gets `kill -9`, which is no fault of the response; `answer` is a file that remembers it."""
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
