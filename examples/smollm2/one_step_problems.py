"""Write word problems with one calculation: prompts, calculations and answers.

    python -m examples.smollm2.one_step_problems [--output .cache/smollm2/one_step]

Writes train.jsonl and held_out.jsonl. The two files have no calculation in common.
"""

import argparse
import json
import random
import sys
from pathlib import Path

NAMES = ("Tom", "Anna", "Ben", "Lily", "Sam", "Mia", "Max", "Eva", "Leo", "Ida")
THINGS = ("apples", "books", "coins", "stickers", "pencils", "marbles", "cards", "shells")
CALCULATIONS = (
    *((first, "+", second) for first in range(2, 61) for second in range(2, 40)),
    *((first, "-", second) for first in range(12, 100) for second in range(2, first)),
    *((first, "*", second) for first in range(2, 13) for second in range(2, 13)),
)
QUESTIONS = {
    "+": "{name} has {first} {things} and gets {second} more. How many {things} does {name} have now?",
    "-": "{name} has {first} {things} and gives away {second}. How many {things} are left?",
    "*": "{name} has {first} boxes with {second} {things} each. How many {things} does {name} have?",
}
RESULTS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
SIZES = {"train.jsonl": 1024, "held_out.jsonl": 128}
SEED = 1


def one_step_problems(count: int, calculations: list[tuple[int, str, int]], rng: random.Random) -> list[dict[str, str]]:
    """Draw problems from these calculations, a third of each kind."""
    problems = []
    for number in range(count):
        kind = tuple(QUESTIONS)[number % len(QUESTIONS)]
        first, _, second = rng.choice([one for one in calculations if one[1] == kind])
        question = QUESTIONS[kind].format(name=rng.choice(NAMES), things=rng.choice(THINGS), first=first, second=second)
        answer = str(RESULTS[kind](first, second))
        solution = f"{first}{kind}{second}={answer}\n\\boxed{{{answer}}}"
        problems.append({"problem": question, "solution": solution, "answer": answer})
    return problems


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".cache/smollm2/one_step"), help="folder to write into")
    output = parser.parse_args().output
    rng = random.Random(SEED)
    calculations = rng.sample(CALCULATIONS, len(CALCULATIONS))
    held_out = len(calculations) // 5
    output.mkdir(parents=True, exist_ok=True)
    for file, of_file in (("train.jsonl", calculations[held_out:]), ("held_out.jsonl", calculations[:held_out])):
        problems = one_step_problems(SIZES[file], of_file, rng)
        (output / file).write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
        print(f"{output / file}: {len(problems)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
