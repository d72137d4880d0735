"""The built-in verifier: the last box of the response equals the gold answer after normalisation.

Method: the usual string comparison for the MATH data set (Hendrycks et al., arXiv 2103.03874): both answers are
normalised and compared as strings; nothing is evaluated. Differences from the usual one: escaped braces are ignored
when looking for the end of a box, single-token exponents lose their braces, thousands lose their commas, integers lose
leading zeros and a zero fraction, a box inside the thinking does not count, and a response with an
unclosed last box has no answer.
"""

import re

THINK_START = "<think>"
THINK_END = "</think>"


def after_thinking(response: str) -> str:
    """The text after the last `</think>`; the whole response without thinking; empty if the thinking never ended.

    An answer inside the thinking is a draft: a model that never stops thinking has not answered.
    """
    _, end, rest = response.rpartition(THINK_END)
    if end:
        return rest
    return "" if THINK_START in response else response


BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
GROUP_OPENERS = re.compile(r"\\[\\{}]|[{}]")

SPACING = re.compile(r"\\[!,;:> ]|\\q?quad(?![a-zA-Z])|~|\s+")
SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])")
DEGREES = re.compile(r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])|°")
TEXT = r"\\(?:text|mbox|textrm|textnormal)\s*\{([^{}]*)\}"
TRAILING_UNIT = re.compile(r"(?<=.)\s*" + TEXT + r"(?:\s*\^\s*(?:\d|\{\d+\}))?\s*$")
WRAPPED_TEXT = re.compile(r"\\(?:text|mbox|textrm|textnormal|textbf|textit|mathrm|mathbf|bold)\s*\{([^{}]*)\}")
THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
LIST_COMMA = re.compile(r",(?:\s|~|\\[ ;:>]|\\q?quad(?![a-zA-Z]))")
NAMED_VALUE = re.compile(r"(?:[a-zA-Z]{1,2}|[a-zA-Z]_\w)=(.+)")
BARE_ROOT = re.compile(r"\\sqrt([^{\[\\]|\\[a-zA-Z]+)")
FRACTION = re.compile(r"\\frac(\{[^{}]*\}|[^{}\\])(\{[^{}]*\}|[^{}\\])")
SLASH_FRACTION = re.compile(r"(-?)(\d+)/(\d+)")
BRACED_TOKEN = re.compile(r"([\^_])\{(\w)\}")
PADDED_INTEGER = re.compile(r"(-?)0*(\d+?)(?:\.0+)?")
BARE_DECIMAL = re.compile(r"(?<![\d\w])\.(?=\d)")


def boxed(response: str, answer: str) -> float:
    """1.0 when the response's last box is the answer, else 0.0; 0.0 without a box or with an empty one.

    Args:
        answer: the gold answer, which may itself have a box or dollar signs.
    """
    given = last_boxed(after_thinking(response))
    if not given:
        return 0.0
    gold = last_boxed(answer)
    return float(same_spelling(given, answer if gold is None else gold))


def same_spelling(given: str, gold: str) -> bool:
    """Whether two answers are the same string after `normalise`, or after removing spaces."""
    return normalise(given) == normalise(gold) or SPACING.sub("", given) == SPACING.sub("", gold)


def boxed_answer(response: str) -> str | None:
    """The response's normalised answer; None without one."""
    given = last_boxed(after_thinking(response))
    return normalise(given) if given else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}`; for `\boxed 5`, the text up to `$` or the end of the line.

    None without a box, or if the last one is not closed.
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip() or None
    depth = 0
    for brace in GROUP_OPENERS.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)  # escaped braces are content
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return None


def normalise(answer: str) -> str:
    r"""The normalised form of an answer.

    Removed: spaces, `\left` and `\right`, dollar and percent signs, degrees, trailing units in `\text{}`, a final
    full stop, thousands commas, leading zeros, a leading `x=`. Unified: `\dfrac` and `\tfrac`, `\frac12`, `1/2` and
    `0.5`, `\sqrt3`, `.5` and `0.5`, `27.0` and `27`, `x^{2}` and `x^2`.
    """
    text = answer.strip().replace("{,}", ",").replace("\\%", "").replace("%", "").replace("\\$", "").replace("$", "")
    text = DEGREES.sub("", SIZES.sub("", text))
    text = WRAPPED_TEXT.sub(r"\1", TRAILING_UNIT.sub("", text))
    text = SPACING.sub("", text).rstrip(".").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    if value := NAMED_VALUE.fullmatch(text):
        text = value.group(1)
    if THOUSANDS.fullmatch(text) and not LIST_COMMA.search(answer):  # `1, 234` is a list
        text = text.replace(",", "")
    if padded := PADDED_INTEGER.fullmatch(text):
        return "".join(padded.groups())
    text = BARE_DECIMAL.sub("0.", text)
    text = BARE_ROOT.sub(r"\\sqrt{\1}", text)
    text = BRACED_TOKEN.sub(r"\1\2", text)
    text = FRACTION.sub(_braced_fraction, text)
    if text == "0.5":
        return r"\frac{1}{2}"
    if fraction := SLASH_FRACTION.fullmatch(text):
        sign, numerator, denominator = fraction.groups()
        return rf"{sign}\frac{{{numerator}}}{{{denominator}}}"
    return text


def _braced_fraction(fraction: re.Match[str]) -> str:
    numerator, denominator = (part if part.startswith("{") else f"{{{part}}}" for part in fraction.groups())
    return rf"\frac{numerator}{denominator}"
