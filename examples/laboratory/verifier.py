"""The verifier of the search problems: evaluates the boxed expression. In its own file, without heavy imports."""

import re

from examples.laboratory.task import parse_problem
from megatron_dsrl.rewards.boxed import last_boxed

_EXPRESSION = re.compile(r"\d(?:[+-]\d)*")


def reaches_target(response: str, answer: str) -> float:
    """1.0 if the last box holds an expression that uses each number once and reaches the target, else 0.0.

    Args:
        response: the model's text.
        answer: the problem's question, which names the numbers and the target.

    Raises:
        ValueError: the answer is not a question of this family.
    """
    problem = parse_problem(answer)
    if problem is None:
        raise ValueError(f"expected a question such as `Make 4 from 2, 7, 5.`, got {answer!r}")
    given = last_boxed(response)
    if given is None or not _EXPRESSION.fullmatch(given):
        return 0.0
    terms = [int(term) for term in re.findall(r"[+-]?\d", given)]
    uses_all = sorted(map(abs, terms)) == sorted(problem.numbers)
    return float(uses_all and sum(terms) == problem.target)
