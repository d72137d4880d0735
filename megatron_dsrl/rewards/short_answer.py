r"""A short answer in words, as in BIG-Bench Hard: the text after the last "the answer is" or "Answer:" on its line.

The form is that of BIG-Bench Hard's chain-of-thought prompts (arXiv 2210.09261). Differences: "Answer:" is a statement
too, a box counts if the answer is not stated, case, surrounding quotes and `\text{}` are ignored, `(B)` may be written
`B` or with the text of the choice, and separators in lists of words are ignored.
"""

import re

from megatron_dsrl.rewards.boxed import after_thinking, last_boxed
from megatron_dsrl.rewards.multiple_choice import letter

STATEMENT = re.compile(r"answer[ \t*_]*(?:is[ \t]*:?|:)[ \t*_]*", re.IGNORECASE)
CHOICE = re.compile(r"\([A-Z]\)")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
EMPHASIS = re.compile(r"\*\*|(?<!\w)[\"'`]|[\"'`](?!\w)|\$")


def short_answer(response: str, answer: str) -> float:
    """1.0 when the stated answer is the gold answer, else 0.0."""
    given = stated_answer(response)
    if given is None:
        return 0.0
    if CHOICE.fullmatch(answer.strip()):
        return float(letter(given) == answer.strip()[1])
    return float(_plain(given) == _plain(answer))


def stated_answer(response: str) -> str | None:
    """The answer of the last statement, else the content of the last box; None without either."""
    text = after_thinking(response)
    statements = list(STATEMENT.finditer(text))
    stated = text[statements[-1].end() :].partition("\n")[0].strip() if statements else last_boxed(text)
    if stated is None:
        return None
    if "\\boxed" in stated:
        stated = last_boxed(stated)
    return stated or None


def _plain(answer: str) -> str:
    """Lower case, single spaces, no quotes or emphasis, no separators between words, no final full stop."""
    words = EMPHASIS.sub("", TEXT_COMMAND.sub(r"\1", answer)).replace(",", " ").lower().split()
    text = " ".join(words)
    return text[:-1].rstrip() if text.endswith(".") else text
