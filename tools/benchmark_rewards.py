"""Rewards of `benchmark_against_trl.py`: standard library only, since both projects' environments import them."""

import re


def boxed_number(response: str, answer: str) -> float:
    """1 if the last \\boxed{...} of the response is the answer, else 0."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", response)
    return float(bool(boxes) and boxes[-1].strip() == answer)


def even_first_word(response: str, answer: str) -> float:
    """1 if the response begins with a word of an even number, such as `w12`, else 0: half of random responses are
    right, and a policy can learn it quickly."""
    match = re.match(r"\s*w(\d+)", response)
    return float(match is not None and int(match[1]) % 2 == 0)
