r"""Multiple choice: one letter, in the last box or in the last statement of the answer.

Statements are those that the benchmarks' own extraction looks for: "the answer is (C)" and "Answer: C" (MMLU-Pro, arXiv
2406.01574; GPQA, arXiv 2311.12022; lm-evaluation-harness), also with "option" or "choice", and "option (C) is correct".
Differences: a box takes precedence over a statement, the last statement counts instead of the first, nothing else is
searched without either, and naming several letters is wrong, so that a model cannot hedge.
"""

import re

from megatron_dsrl.rewards.boxed import after_thinking, last_boxed

WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|boxed)\s*(?=\{)|[${}*_`]|\\[,;! ]")
CHOICE = re.compile(r"\(?\s*([A-Z])\s*(?:$|\)|[.:,](?=\s|$))")
STATEMENT = re.compile(
    r"(?:answer|option|choice)[\s*_]*(?:is|:)[\s*_]*:?\s*(?:(?:the\s+)?(?:option|choice|letter)\b\s*)?", re.IGNORECASE
)
VERDICT = re.compile(
    r"(?:\b(?:option|choice|answer)\s*)(?=\(?\s*[A-Z]\b\s*\)?[\s*_]*is\s+(?:the\s+)?(?:correct|right|best))",
    re.IGNORECASE,
)
END_OF_STATEMENT = re.compile(r"[).,;:]|\s(?:because|since|as|is)\b|$")
LONE_LETTER = re.compile(r"\(?([a-z])\)?\.?")
SEVERAL = re.compile(r"(?:\bor\b|\band\b|[,/&;])\s*(?:\(\s*[A-Z]\s*\)|[A-Z](?![\w'-]))")


def multiple_choice(response: str, answer: str, require_box: bool = False) -> float:
    """1.0 when the chosen letter is the answer, else 0.0.

    Args:
        answer: the right letter, such as `C` or `(C)`.
        require_box: whether only a letter in a box counts.

    Raises:
        ValueError: the gold answer is not a letter.
    """
    gold = letter(answer)
    if gold is None:
        raise ValueError(f"the gold answer of a multiple-choice problem must be one letter, not {answer!r}")
    return float(chosen_letter(response, require_box) == gold)


def chosen_letter(response: str, require_box: bool = False) -> str | None:
    """The letter that the response chose; None if it chose none or several."""
    text = after_thinking(response)
    box = last_boxed(text)
    if box is not None or require_box or "\\boxed" in text:
        return None if box is None else letter(box)
    ends = [match.end() for pattern in (STATEMENT, VERDICT) for match in pattern.finditer(text)]
    return _stated_letter(text[max(ends) :].partition("\n")[0]) if ends else None


def letter(choice: str) -> str | None:
    r"""`C` for `C`, `(C)`, `C.`, `\text{(C)}`, `C: the text of the choice`; None for others or several letters."""
    text = WRAPPING.sub("", choice).strip()
    match = CHOICE.match(text)
    return None if match is None or SEVERAL.search(text[match.end(1) :]) else match.group(1)


def _stated_letter(statement: str) -> str | None:
    text = WRAPPING.sub("", statement).strip()
    if lone := LONE_LETTER.fullmatch(text):
        return lone[1].upper()
    match = re.match(r"\(\s*([A-Z])\s*\)|([A-Z])(?![\w'-])", text)
    if match is None or SEVERAL.search(text[match.end() :]):
        return None
    if match.group(1) is None and not END_OF_STATEMENT.match(text, match.end()):
        return None  # `A` may be an article, and `I` a pronoun
    return match.group(1) or match.group(2)
