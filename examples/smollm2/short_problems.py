"""Write GSM8K's problems with at most two calculations as prompts, calculations and answers.

    python -m examples.smollm2.short_problems FOLDER [--output .cache/smollm2]

FOLDER holds GSM8K's train.jsonl and test.jsonl (https://github.com/openai/grade-school-math). Writes train.jsonl and
held_out.jsonl. A solution is what stands in the calculator marks (`<<48/2=24>>`), one per line, and the answer in a
box. Problems whose last calculation does not give the answer are left out.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from megatron_dsrl.common.errors import UserError

CALCULATION = re.compile(r"<<([^>]*)>>")
MOST_CALCULATIONS = 2
FILES = {"train.jsonl": "train.jsonl", "test.jsonl": "held_out.jsonl"}
"""Written from which file of GSM8K."""


def short_problem(row: dict[str, str]) -> dict[str, str] | None:
    """Problem, solution and answer of one of GSM8K's rows; None if it has too many calculations, or too few marked."""
    worked, _, answer = row["answer"].partition("\n#### ")
    calculations = [calculation.strip() for calculation in CALCULATION.findall(worked)]
    answer = answer.strip().replace(",", "")
    if not 1 <= len(calculations) <= MOST_CALCULATIONS or not calculations[-1].endswith(f"={answer}"):
        return None
    lines = [*calculations, f"\\boxed{{{answer}}}"]
    return {"problem": row["question"], "solution": "\n".join(lines), "answer": answer}


def write_problems(source: Path, target: Path) -> int:
    """Write the short problems among those of a file; returns their number.

    Raises:
        UserError: the file is missing or is not GSM8K's.
    """
    try:
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        problems = [problem for row in rows if (problem := short_problem(row)) is not None]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source} is not a file of GSM8K: {error!r}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
    return len(problems)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, default=Path(".cache/smollm2"), help="folder to write into")
    arguments = parser.parse_args()
    try:
        for source, target in FILES.items():
            count = write_problems(arguments.folder / source, arguments.output / target)
            print(f"{arguments.output / target}: {count} problems")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
