r"""Mathematical equality of the last box and the gold answer, by the math-verify package.

What math-verify does by itself would reward more than a right answer: it accepts unboxed numbers, joins several boxes
into one set, and without delimiters does not read many gold answers. Here

- the last box is cut out as in `boxed`, and only its content is parsed, as one box;
- equal spellings (`boxed.normalise`) are right without parsing, which also covers answers that are no mathematics;
- the gold answer is parsed as `$...$`;
- math-verify's own time limits are off. They are alarms, which threads cannot set and which do not interrupt
  everything; the reward pool's hard limit is what bounds `9^{9^{9}}`.

`verify` is not symmetric: gold `1<x<2` accepts the interval `(1,2)`, not the other way round. Answers separated by
commas are compared as sets, so their order does not matter, and all of them are needed.
"""

import logging
from functools import cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from megatron_dsrl.rewards.boxed import last_boxed, normalise
from megatron_dsrl.rewards.response import after_thinking

IN_ONE_BOX = (LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),)
IN_DOLLARS = (LatexExtractionConfig(),)

# It warns at every call that its time limits are off.
for name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(name).setLevel(logging.ERROR)


def math_verify(response: str, answer: str, decimals: int = 6) -> float:
    """1.0 when the response's last box equals the answer mathematically, else 0.0; 0.0 without a box.

    Args:
        response: The model's text.
        answer: The gold answer, with or without a box or dollar signs of its own.
        decimals: Digits behind the point to which numbers must agree.
    """
    given = last_boxed(after_thinking(response))
    if not given:
        return 0.0
    boxed_gold = last_boxed(answer)
    gold = answer if boxed_gold is None else boxed_gold
    if normalise(given) == normalise(gold):
        return 1.0
    parsed = parse(rf"\boxed{{{given}}}", extraction_config=IN_ONE_BOX, parsing_timeout=None)
    equal = verify(_parsed_gold(gold), parsed, float_rounding=decimals, timeout_seconds=None)
    return float(equal)


@cache  # a worker sees the same gold answer once per sample
def _parsed_gold(gold: str) -> list[Any]:
    delimited = "$" in gold and gold.count("$") % 2 == 0  # data sets hold golds such as `$221,$8$`
    text = gold if delimited else f"${gold.replace('$', '')}$"
    return parse(text, extraction_config=IN_DOLLARS, parsing_timeout=None)
