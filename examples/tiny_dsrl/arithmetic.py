"""The tiny task: rows of additions and subtractions, solved step by step, and often wrongly.

A solution first restates the problem, then rewrites it one operation per line until one number is left, and puts that
number into the box. `4+9-5=?` is solved as

    4+9-5
    =13-5
    =8
    \\boxed{8}

A base model that is trained on correct solutions leaves reinforcement learning little to do, so wrong ones are written
here too (`Noise`). Their mistakes can be seen in the response alone, without the problem: a line that does not follow
from the line above, an operation that was forgotten on the way, a box that does not hold the last line's number. That
matters for updates in the pre-train space, where the prompt is masked out of the context.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["corpus", "train", "held_out"]
Terms = tuple[int, ...]
"""Signed numbers that are added up, as (4, 9, -5) for `4+9-5`."""

OPERATIONS = 3
"""Operations of a problem."""

LARGEST_TERM = 9
"""Terms lie in 1..LARGEST_TERM (before their sign)."""

LARGEST_VALUE = 20
"""All intermediate results of a problem lie in 0..LARGEST_VALUE."""


@dataclass(frozen=True)
class Problem:
    """A row of additions and subtractions."""

    terms: Terms

    @property
    def text(self) -> str:
        """The user's question, such as `4+9-5=?`."""
        return f"{write_terms(self.terms)}=?"

    @property
    def answer(self) -> str:
        """The gold answer."""
        return str(sum(self.terms))


def write_terms(terms: Terms) -> str:
    """(4, 9, -5) -> `4+9-5`."""
    return str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])


def split_of(problem: Problem) -> Split:
    """Which split a problem belongs to: a function of its text alone, so that no problem can be in two."""
    bucket = hashlib.sha256(problem.text.encode()).digest()[0]  # 0..255
    if bucket < 32:
        return "held_out"
    return "train" if bucket < 128 else "corpus"


def draw_problem(rng: random.Random) -> Problem:
    """A random problem."""
    value = rng.randint(1, LARGEST_TERM)
    terms = [value]
    for _ in range(OPERATIONS):
        may_add, may_subtract = value < LARGEST_VALUE, value > 0
        if may_add and (not may_subtract or rng.random() < 0.5):
            term = rng.randint(1, min(LARGEST_TERM, LARGEST_VALUE - value))
        else:
            term = -rng.randint(1, min(LARGEST_TERM, value))
        terms.append(term)
        value += term
    return Problem(tuple(terms))


def draw_problems(split: Split, rng: random.Random) -> Iterator[Problem]:
    """An endless stream of problems of one split; they may repeat."""
    while True:
        problem = draw_problem(rng)
        if split_of(problem) == split:
            yield problem


def different_problems(split: Split, count: int, rng: random.Random) -> list[Problem]:
    """`count` different problems of one split."""
    chosen: dict[Problem, None] = {}
    for problem in draw_problems(split, rng):
        chosen[problem] = None
        if len(chosen) == count:
            return list(chosen)
    raise AssertionError("the stream of problems is endless")


@dataclass(frozen=True)
class Noise:
    """How often a written solution goes wrong. Every rate is a probability."""

    hasty: float
    """Probability that the writer does two operations at once while two or more are left."""

    forgotten_operation: float
    """Probability that the second of two operations done at once is forgotten."""

    merged_step: float
    """Probability that the result is wrong when two operations are done at once."""

    carry: float
    """Probability that the carry or borrow is forgotten in an operation that crosses a ten."""

    step: float
    """Probability of one of STEP_MISTAKES in an operation in which no carry was forgotten."""

    rambling: float
    """Probability that the last line of a solution is repeated two to five times."""

    unboxed: float
    """Probability that a solution has no box."""

    wrong_box: float
    """Probability that the box of a boxed solution differs from the last line."""


NO_NOISE = Noise(hasty=0, forgotten_operation=0, merged_step=0, carry=0, step=0, rambling=0, unboxed=0, wrong_box=0)

STEP_MISTAKES = ("off_by_one", "swapped_digits", "wrong_sign", "miscopied_term", "dropped_term")
"""Mistakes in one operation. The last two need a later term, the second needs two digits."""


@dataclass(frozen=True)
class Solution:
    """A written solution, and the names of what went wrong in it, in order."""

    text: str
    mistakes: tuple[str, ...]


def gold_solution(problem: Problem) -> str:
    """The solution without a mistake."""
    return write_solution(problem, NO_NOISE, random.Random(0)).text


def write_solution(problem: Problem, noise: Noise, rng: random.Random) -> Solution:
    """Write a solution down. A wrong line is carried on: what follows starts from it."""
    hasty = rng.random() < noise.hasty
    mistakes = ["hasty"] if hasty else []
    terms = problem.terms
    lines = [write_terms(terms)]
    while len(terms) > 1:
        take_step = merge_two_operations if hasty and len(terms) > 2 else do_one_operation
        terms, mistake = take_step(terms, noise, rng)
        mistakes += [mistake] if mistake else []
        lines.append("=" + write_terms(terms))
    return finish(lines, terms[0], mistakes, noise, rng)


def do_one_operation(terms: Terms, noise: Noise, rng: random.Random) -> tuple[Terms, str | None]:
    """The terms of the next line, and the mistake in it, if any."""
    first, second, rest = terms[0], terms[1], terms[2:]
    right = first + second
    if crosses_ten(first, second) and rng.random() < noise.carry:
        return (right - 10 if second > 0 else right + 10, *rest), "carry"
    if rng.random() >= noise.step:
        return (right, *rest), None
    mistake = rng.choice(possible_mistakes(right, rest))
    match mistake:
        case "off_by_one":
            return (right + rng.choice((-1, 1)), *rest), mistake
        case "swapped_digits":
            return (int(str(right)[::-1]), *rest), mistake
        case "wrong_sign":
            return (first - second, *rest), mistake
        case "miscopied_term":
            return (right, *replaced(rest, rng.randrange(len(rest)), rng)), mistake
        case "dropped_term":
            which = rng.randrange(len(rest))
            return (right, *rest[:which], *rest[which + 1 :]), mistake
    raise AssertionError(mistake)


def merge_two_operations(terms: Terms, noise: Noise, rng: random.Random) -> tuple[Terms, str | None]:
    """The terms after two operations at once, and the mistake in them, if any."""
    first, second, third, rest = terms[0], terms[1], terms[2], terms[3:]
    if rng.random() < noise.forgotten_operation:
        return (first + second, *rest), "forgotten_operation"
    if rng.random() >= noise.merged_step:
        return (first + second + third, *rest), None
    wrong = rng.choice((first + second - third, first - second + third, first + second + third + rng.choice((-1, 1))))
    return (wrong, *rest), "merged_step"


def finish(lines: list[str], result: int, mistakes: list[str], noise: Noise, rng: random.Random) -> Solution:
    """The end of a solution: perhaps some rambling, perhaps a box, perhaps the right one."""
    if rng.random() < noise.rambling:
        mistakes = [*mistakes, "rambling"]
        lines = lines + [f"={result}"] * rng.randint(2, 5)
    if rng.random() < noise.unboxed:
        return Solution("\n".join(lines), (*mistakes, "unboxed"))
    if rng.random() < noise.wrong_box:
        mistakes = [*mistakes, "wrong_box"]
        result += rng.choice((-10, -1, 1, 10))
    return Solution("\n".join([*lines, f"\\boxed{{{result}}}"]), tuple(mistakes))


def crosses_ten(first: int, second: int) -> bool:
    """Whether adding the signed `second` to a non-negative `first` carries into the tens or borrows from them."""
    if first < 0:
        return False
    return first % 10 + second >= 10 if second > 0 else first >= 10 and first % 10 < -second


def possible_mistakes(result: int, rest: Terms) -> list[str]:
    """The mistakes that can be made in an operation with this right result."""
    two_digits = result >= 10 and str(result) != str(result)[::-1]
    impossible = {"swapped_digits"} if not two_digits else set()
    impossible |= {"miscopied_term", "dropped_term"} if not rest else set()
    return [mistake for mistake in STEP_MISTAKES if mistake not in impossible]


def replaced(terms: Terms, which: int, rng: random.Random) -> Terms:
    """The terms with one of them changed to another of the same sign."""
    sign = 1 if terms[which] > 0 else -1
    other = rng.choice([n for n in range(1, LARGEST_TERM + 1) if n != abs(terms[which])])
    return (*terms[:which], sign * other, *terms[which + 1 :])
