r"""Mathematical equality of the last box and the gold answer, with the math-verify package.

math-verify alone rewards more than right answers: it accepts unboxed numbers, joins several boxes into one set, and
drops the base of a number and the left side of an equation. It also cannot parse many gold answers. Here

- the last box is extracted as in `boxed`, and only its content is parsed, as one box;
- answers equal as strings (`boxed.same_spelling`) are right without parsing, even if they are not mathematics;
- both sides are made parseable first (`readable`): without dollar and percent signs, `-1./3` as `-1/3`, `np.arcsin` as
  `\arcsin`, and the symbols `E_1` and `I_1` as symbols, not as the constants e and i;
- a number with a base (`4210_5`) equals only the same digits in the same base;
- every number that an equation in the box equates must be the answer: `2+4=6` and `x=6` give 6, `5=6` does not;
- the gold answer is parsed as `$...$`;
- math-verify's own time limits are off. They are alarms, which threads cannot set and which cannot interrupt
  everything; the reward pool's hard limit bounds `9^{9^{9}}`.

`verify` is not symmetric: gold `1<x<2` accepts the interval `(1,2)`, but not the other way round. Answers separated by
commas are compared as sets: order does not matter, and all of them are required; gold `x=1,y=2` accepts `(1,2)`.
A gold answer without a base accepts its digits in any base. Units are not compared.
"""

import logging
import re
from functools import cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from megatron_dsrl.rewards.boxed import after_thinking, last_boxed, same_spelling

IN_ONE_BOX = (LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),)
IN_DOLLARS = (LatexExtractionConfig(),)

BASED_NUMBER = re.compile(r"\(?([\dA-F]+)\)?_\{?(\d+)\}?")
DECIMAL_WITHOUT_DIGITS = re.compile(r"(?<=\d)\.(?!\d)")
NUMPY_FUNCTION = re.compile(r"\bnp\.([a-z]+)")
COMMAND_AS_SUBSCRIPT = re.compile(r"_(?:\{\s*\\([a-zA-Z]+)\s*\}|\\([a-zA-Z]+))")
CONSTANT_WITH_SUBSCRIPT = re.compile(r"(?<![\\a-zA-Z])([EeIi])(?=_)")
EQUALS = re.compile(r"(?<![<>!:\\])=")

STAND_INS = {"e": r"\Upsilon", "i": r"\Xi"}
"""Symbols that no answer uses, to replace those that the parser would take for constants."""

# math-verify warns at every call that its time limits are off.
for name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(name).setLevel(logging.ERROR)


def math_verify(response: str, answer: str, decimals: int = 6) -> float:
    """1.0 when the response's last box equals the answer mathematically, else 0.0; 0.0 without a box.

    Args:
        answer: the gold answer, which may itself have a box or dollar signs.
        decimals: decimal places to which numbers must agree.
    """
    given = last_boxed(after_thinking(response))
    if not given:
        return 0.0
    gold = gold_answer(answer)
    if same_spelling(given, gold):
        return 1.0
    if base := BASED_NUMBER.fullmatch(_bare(gold)):
        found = BASED_NUMBER.fullmatch(_bare(given))
        return float(found is not None and found.groups() == base.groups())
    parsed_gold = _parsed_gold(gold)
    equal = verify(parsed_gold, _parsed_box(given), float_rounding=decimals, timeout_seconds=None)
    return float(equal and not _equates_another_number(given, gold, parsed_gold, decimals))


def gold_answer(answer: str) -> str:
    """The content of the gold answer's last box, or all of it without a box."""
    boxed = last_boxed(answer)
    return answer if boxed is None else boxed


def is_parsed(answer: str) -> bool:
    """Whether a gold answer can be compared by value, and not only as a string."""
    gold = gold_answer(answer)
    return _has_value(_parsed_gold(gold)) or bool(BASED_NUMBER.fullmatch(_bare(gold)))


def readable(text: str) -> str:
    r"""An answer in a form that the parser understands; applied to both sides of a comparison."""
    text = re.sub(r"\\?%", "", text.replace(r"\$", ""))
    text = NUMPY_FUNCTION.sub(r"\\\1", DECIMAL_WITHOUT_DIGITS.sub("", text))
    text = COMMAND_AS_SUBSCRIPT.sub(lambda match: f"_{{{match[1] or match[2]}}}", text)
    return CONSTANT_WITH_SUBSCRIPT.sub(lambda match: STAND_INS[match[1].lower()], text)


def _equates_another_number(given: str, gold: str, parsed_gold: list[Any], decimals: int) -> bool:
    """Whether the box is an equation, the answer is not, and a side without variables differs from the answer."""
    sides = EQUALS.split(given)
    if len(sides) == 1 or EQUALS.search(gold):
        return False
    values = [_parsed_box(side) for side in sides]
    numbers = [value for value in values if value and getattr(value[0], "is_number", False)]
    return not all(verify(parsed_gold, n, float_rounding=decimals, timeout_seconds=None) for n in numbers)


def _parsed_box(content: str) -> list[Any]:
    text = readable(content).replace("$", "")
    return parse(rf"\boxed{{{text}}}", extraction_config=IN_ONE_BOX, parsing_timeout=None)


@cache  # a worker sees the same gold answer once per sample
def _parsed_gold(gold: str) -> list[Any]:
    text = readable(gold)
    delimited = "$" in text and text.count("$") % 2 == 0  # data sets hold golds such as `$221,$8$`
    whole = f"${text.replace('$', '')}$"
    found = parse(text, extraction_config=IN_DOLLARS, parsing_timeout=None) if delimited else []
    # dollar signs may split a sum in the middle
    return found if _has_value(found) else parse(whole, extraction_config=IN_DOLLARS, parsing_timeout=None)


def _has_value(parsed: list[Any]) -> bool:
    return any(not isinstance(value, str) for value in parsed)


def _bare(answer: str) -> str:
    return re.sub(r"[\s$]|\\[!,;:]|\\text(?:rm|bf|it)?|\\math(?:rm|bf|it)", "", answer)
