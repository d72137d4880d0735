"""The tiny task: disjoint splits, right gold solutions, and mistakes that happen as often as they are asked to."""

import random
import re
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny_dsrl.arithmetic import (
    LARGEST_VALUE,
    NO_NOISE,
    STEP_MISTAKES,
    different_problems,
    do_one_operation,
    draw_problem,
    draw_problems,
    gold_solution,
    merge_two_operations,
    split_of,
    write_solution,
)
from megatron_dsrl.rewards.boxed import boxed

problems = st.integers(0, 2**32).map(lambda seed: draw_problem(random.Random(seed)))


@given(problems)
def test_answer_is_what_the_row_evaluates_to(problem) -> None:
    assert int(problem.answer) == eval(problem.text.removesuffix("=?"))
    partial_sums = [sum(problem.terms[:n]) for n in range(1, len(problem.terms) + 1)]
    assert all(0 <= value <= LARGEST_VALUE for value in partial_sums)


@given(problems)
def test_gold_solution_scores_one_and_every_line_of_it_follows(problem) -> None:
    solution = gold_solution(problem)
    assert boxed(solution, problem.answer) == 1.0
    *lines, box = solution.split("\n")
    assert [eval(line.removeprefix("=")) for line in lines] == [int(problem.answer)] * len(lines)
    assert lines[0] == problem.text.removesuffix("=?")
    assert box == f"\\boxed{{{problem.answer}}}"


def test_splits_are_disjoint_and_large_enough() -> None:
    splits = ("train", "held_out", "corpus")
    drawn = {split: set(islice(draw_problems(split, random.Random(7)), 3000)) for split in splits}
    for split, chosen in drawn.items():
        assert {split_of(problem) for problem in chosen} == {split}
    assert not drawn["train"] & drawn["held_out"] and not drawn["corpus"] & (drawn["train"] | drawn["held_out"])
    assert min(map(len, drawn.values())) > 1000


def test_different_problems_do_not_repeat_and_depend_on_the_generator_alone() -> None:
    first = different_problems("train", 500, random.Random(1))
    assert len(set(first)) == 500
    assert first == different_problems("train", 500, random.Random(1))
    assert first != different_problems("train", 500, random.Random(2))


@pytest.mark.parametrize("rate", ["hasty", "rambling", "unboxed", "wrong_box"])
def test_mistakes_of_a_whole_solution_come_at_their_rate(rate) -> None:
    noise, rng = replace(NO_NOISE, **{rate: 0.3}), random.Random(1)
    solutions = [write_solution(problem, noise, rng) for problem in islice(draw_problems("corpus", rng), 2000)]
    share = sum(rate in solution.mistakes for solution in solutions) / 2000
    assert share == pytest.approx(0.3, abs=0.04)  # four standard errors


@pytest.mark.parametrize(
    ("rate", "terms"),
    [("step", (4, 3, -1)), ("carry", (7, 8)), ("forgotten_operation", (1, 2, 3, 4)), ("merged_step", (1, 2, 3, 4))],
)
def test_mistakes_of_an_operation_come_at_their_rate(rate, terms) -> None:
    take_step = merge_two_operations if len(terms) == 4 else do_one_operation
    noise, rng = replace(NO_NOISE, **{rate: 0.3}), random.Random(1)
    mistakes = [take_step(terms, noise, rng)[1] for _ in range(2000)]
    assert sum(mistake is not None for mistake in mistakes) / 2000 == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("rate", ["forgotten_operation", "merged_step", "carry", "step", "wrong_box"])
def test_a_mistake_shows_in_the_response_alone(rate) -> None:
    """Every noted mistake breaks the chain from some line to the next or to the box, without a look at the problem."""
    noise = replace(NO_NOISE, hasty=float(rate in ("forgotten_operation", "merged_step")), **{rate: 1.0})
    rng = random.Random(2)
    for problem in islice(draw_problems("corpus", rng), 300):
        solution = write_solution(problem, noise, rng)
        values = [eval(line.strip("=")) for line in re.sub(r"\\boxed\{(.*)\}", r"\1", solution.text).split("\n")]
        noted = [mistake for mistake in solution.mistakes if mistake != "hasty"]
        assert (len(set(values)) > 1) == bool(noted), solution


def test_every_step_mistake_occurs() -> None:
    noise, rng = replace(NO_NOISE, step=1.0), random.Random(3)
    solutions = [write_solution(problem, noise, rng) for problem in islice(draw_problems("corpus", rng), 500)]
    assert {mistake for solution in solutions for mistake in solution.mistakes} == set(STEP_MISTAKES)
