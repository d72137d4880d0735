"""Search problems: reach a target with a few numbers, each used once, joined by + and -.

A response makes attempts, step by step. After an attempt it may say whether it hit the target, check it, go back to an
earlier step ("Wait, go back.") or start again ("Alternatively, ..."). `Make 4 from 2, 7, 5.` may be answered by

    So then now 2+7=9
    9+5=14 No.

    Wait, go back. here next So 2+7=9
    9-5=4 Yes.

    \\boxed{2+7-5}

A base model is trained on two kinds of documents. The *patient* ones, in the first stage, nearly always search until
they succeed. The *hasty* ones, in the second, mostly take the first attempt and stop. The model has then learned to
search, rarely does, and is right more often when it does. `Family` has the dials; everything here is a pure function
of its arguments.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from megatron_dsrl.config.section import Section

Split = Literal["corpus", "train", "held_out"]
Terms = tuple[int, ...]
"""Signed numbers in the order in which they are added up, as (2, 7, -5); the first is positive."""

LARGEST_NUMBER = 9
"""Numbers of a problem lie in 1..LARGEST_NUMBER."""

PHRASES = ("So ", "then ", "now ", "perhaps ", "maybe ", "let us see ", "here ", "next ")
"""What `Family.wording` draws from: words that neither the prompt nor the rest of the response explains."""

WAIT, ALTERNATIVELY, CHECK, NEED, BEFORE = "Wait, go back. ", "Alternatively, ", "Let me check: ", "I need ", " before "
YES, NO = " Yes.", " No."
DRAWS = 50
"""Draws per wanted problem, after which the family counts as too small."""
PATIENT = 0.95
"""Probability of a verdict, and of going on after a wrong attempt, in a patient document."""

_PROBLEM = re.compile(r"Make (\d+) from (\d(?:, \d)*)\.")


class Family(Section):
    """The dials: which problems there are, how responses to them are written, and how rarely they search."""

    numbers: int = Field(default=3, ge=2, le=5)
    """Numbers of a problem. Each adds a line to every attempt and doubles the attempts that are possible."""

    wording: int = Field(default=3, ge=0)
    """Phrases before every attempt. They make responses longer without tokens that only the prompt explains."""

    restates_problem: bool = False
    """Whether a response begins with the problem. Nothing but the prompt explains these tokens."""

    visible: float = Field(default=0.7, ge=0, le=1)
    """Probability that a hasty attempt is followed by `Yes.` or `No.`, so that the response alone shows the mistake."""

    search: float = Field(default=0.1, ge=0, le=1)
    """Probability that a hasty writer looks at an attempt again: checks it, and goes on if it is wrong."""

    checks: float = Field(default=0.5, ge=0, le=1)
    """Probability that looking again includes the line `Let me check`."""

    subgoals: float = Field(default=0.3, ge=0, le=1)
    """Probability that a new approach begins with what the last step needs."""

    insight: float = Field(default=0.0, ge=0, le=1)
    """Probability that an attempt is right on purpose rather than by chance."""

    unprompted: float = Field(default=0.5, ge=0, le=1)
    """Probability that a hasty document has no prompt."""

    attempts: int = Field(default=6, ge=1)
    """Number of attempts after which a writer gives up."""


@dataclass(frozen=True)
class Problem:
    """Numbers and the target to reach with them."""

    numbers: tuple[int, ...]
    target: int

    @property
    def text(self) -> str:
        """The user's question, such as `Make 4 from 2, 7, 5.`."""
        return f"Make {self.target} from {', '.join(map(str, self.numbers))}."


def parse_problem(text: str) -> Problem | None:
    """The problem in a text that holds its question, such as a rendered prompt; None without one."""
    match = _PROBLEM.search(text)
    return Problem(tuple(map(int, match[2].split(", "))), int(match[1])) if match else None


def candidates(numbers: Sequence[int]) -> list[Terms]:
    """All ways to give the numbers signs such that their sum is not negative, in the numbers' order."""
    signed = itertools.product(*((number, -number) for number in numbers))
    return [terms for terms in signed if sum(terms) >= 0]


def draw_problem(count: int, rng: random.Random) -> Problem:
    """A random problem with `count` numbers; it has a solution, and a target of at least 1."""
    while True:
        numbers = tuple(rng.randint(1, LARGEST_NUMBER) for _ in range(count))
        target = sum(rng.choice(candidates(numbers)))
        if target >= 1:
            return Problem(numbers, target)


def split_of(problem: Problem) -> Split:
    """The split of a problem, a function of its target and numbers in any order: no problem is in two splits."""
    text = f"{problem.target} {sorted(problem.numbers)}"
    bucket = hashlib.sha256(text.encode()).digest()[0]  # 0..255
    return "held_out" if bucket < 48 else "train" if bucket < 144 else "corpus"


def draw_problems(split: Split, count: int, rng: random.Random) -> Iterator[Problem]:
    """An endless stream of problems of one split with `count` numbers each; they may repeat."""
    while True:
        problem = draw_problem(count, rng)
        if split_of(problem) == split:
            yield problem


def different_problems(split: Split, count: int, wanted: int, rng: random.Random) -> list[Problem]:
    """`wanted` different problems of one split; the order of the numbers counts.

    Raises:
        ValueError: the family has fewer.
    """
    chosen: dict[Problem, None] = {}
    for problem in itertools.islice(draw_problems(split, count, rng), DRAWS * wanted):
        chosen[problem] = None
        if len(chosen) == wanted:
            return list(chosen)
    raise ValueError(f"only {len(chosen)} different problems with {count} numbers in {split}, not {wanted}")


def write_response(problem: Problem, family: Family, patient: bool, rng: random.Random) -> str:
    """A response as a pre-training document has it.

    Args:
        patient: whether the writer nearly always says how an attempt went, and goes on after a wrong one.
    """
    visible, search = (PATIENT, PATIENT) if patient else (family.visible, family.search)
    parts = [problem.text] if family.restates_problem else []
    tried: list[Terms] = []
    intro = ""
    while True:
        terms = _next_attempt(problem, family, tried, intro, rng)
        tried.append(terms)
        value, right = sum(terms), sum(terms) == problem.target
        verdict = (YES if right else NO) if rng.random() < visible else ""
        parts.append(_introduction(problem, terms, family, intro, rng) + working(terms) + verdict)
        looks_again = rng.random() < search
        if looks_again and rng.random() < family.checks:
            parts.append(f"{CHECK}{value} is {'' if right else 'not '}{problem.target}.")
        if right or not looks_again or len(tried) == family.attempts or not _untried(problem, tried):
            return "\n\n".join([*parts, f"\\boxed{{{expression(terms)}}}"])
        may_go_back = any(_shares_first_step(other, terms) for other in _untried(problem, tried))
        intro = WAIT if may_go_back and rng.random() < 0.5 else ALTERNATIVELY


def working(terms: Terms) -> str:
    """(2, 7, -5) -> `2+7=9` and, on the next line, `9-5=4`."""
    sums = list(itertools.accumulate(terms))
    return "\n".join(f"{before}{term:+d}={after}" for before, term, after in zip(sums, terms[1:], sums[1:]))


def expression(terms: Terms) -> str:
    """(2, 7, -5) -> `2+7-5`."""
    return str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])


def _introduction(problem: Problem, terms: Terms, family: Family, intro: str, rng: random.Random) -> str:
    needed = problem.target - terms[-1]
    if intro == ALTERNATIVELY and needed >= 0 and rng.random() < family.subgoals:
        intro += f"{NEED}{needed}{BEFORE}{terms[-1]:+d}. "
    return intro + "".join(rng.choice(PHRASES) for _ in range(family.wording))


def _next_attempt(problem: Problem, family: Family, tried: Sequence[Terms], intro: str, rng: random.Random) -> Terms:
    """Terms whose signs have not been tried; after `Wait` the first step is the last attempt's."""
    options = _untried(problem, tried)
    if intro == WAIT:
        options = [option for option in options if _shares_first_step(option, tried[-1])]
        return _in_order(rng.choice(options), tried[-1][:2], rng)
    right = [option for option in options if sum(option) == problem.target]
    return _in_order(rng.choice(right if right and rng.random() < family.insight else options), (), rng)


def _untried(problem: Problem, tried: Sequence[Terms]) -> list[Terms]:
    before = {tuple(sorted(terms)) for terms in tried}
    return [terms for terms in candidates(problem.numbers) if tuple(sorted(terms)) not in before]


def _shares_first_step(option: Terms, last: Terms) -> bool:
    """Whether the option can be written with the first two terms of the last attempt."""
    rest = list(option)
    for term in last[:2]:
        if term not in rest:
            return False
        rest.remove(term)
    return True


def _in_order(terms: Terms, first: Terms, rng: random.Random) -> Terms:
    """The terms in a random order that begins with `first` and has no negative sum on the way."""
    rest = list(terms)
    for term in first:
        rest.remove(term)
    while True:
        rng.shuffle(rest)
        order = (*first, *rest)
        if all(total >= 0 for total in itertools.accumulate(order)):
            return order
