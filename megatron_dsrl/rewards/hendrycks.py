r"""The string comparison that the paper's released code uses for training and benchmarks.

It is the usual one for the MATH data set (Hendrycks et al., arXiv 2103.03874), as in verl and lm-evaluation-harness:
both answers are normalised and compared as strings. Its quirks are kept: a box counts anywhere in the response, the
gold answer is not unboxed, and only `\text{ ` with a space begins a unit. Use it to score a table the way the paper's
was scored; we consider `math_verify` more correct.
"""

import re

REMOVED = ("\n", r"\!")
RESPELLED = ((r"\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"))
REMOVED_AFTER = (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$")
ROOT_WITHOUT_BRACES = re.compile(r"\\sqrt([^{])")
FRACTION_OF_INTEGERS = re.compile(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))")


class MalformedError(ValueError):
    """An answer that cannot be normalised; it equals only the identical text."""


def hendrycks(response: str, answer: str) -> float:
    """1.0 when the last box of the response equals the answer after normalisation, else 0.0."""
    given = last_box(response)
    if given is None:
        return 0.0
    try:
        return float(spelling(given) == spelling(answer))
    except MalformedError:
        return float(given == answer)


def hendrycks_answer(response: str) -> str | None:
    """The response's normalised answer; None without one."""
    given = last_box(response)
    try:
        return None if given is None else spelling(given)
    except MalformedError:
        return given


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, braces counted; for `\boxed ` with a space, the text up to a dollar sign.

    None without a box, if the last one is not closed, and for `\fbox`, on which the released code fails.
    """
    if r"\boxed " in text:
        return text.rpartition(r"\boxed ")[2].partition("$")[0]
    start = text.rfind(r"\boxed")
    if start < 0:
        return None
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if text[position] == "}" and depth == 0:
            inside = text[start + len(r"\boxed") : position + 1]
            return inside[1:-1] if inside.startswith("{") else None
    return None


def spelling(answer: str) -> str:
    """The normalised form of an answer. Raises MalformedError if it has two units, or an empty root or fraction."""
    for text in REMOVED:
        answer = answer.replace(text, "")
    for old, new in RESPELLED:
        answer = answer.replace(old, new)
    for text in REMOVED_AFTER:
        answer = answer.replace(text, "")
    answer = _without_unit(answer).replace(r"\\%", "").replace(r"\%", "")
    answer = answer.replace(" .", " 0.").replace("{.", "{0.")
    answer = f"0{answer}" if answer.startswith(".") else answer
    name, equals, value = answer.partition("=")
    if equals and len(name) <= 2 and "=" not in value:
        answer = value
    answer = _with_braced_fractions(_with_braced_roots(answer).replace(" ", ""))
    answer = r"\frac{1}{2}" if answer == "0.5" else answer
    return FRACTION_OF_INTEGERS.sub(r"\\frac{\1}{\2}", answer) if FRACTION_OF_INTEGERS.fullmatch(answer) else answer


def _without_unit(answer: str) -> str:
    before, unit, after = answer.partition(r"\text{ ")
    if unit and unit in after:
        raise MalformedError(answer)
    return before


def _with_braced_roots(answer: str) -> str:
    if re.search(r"\\sqrt(?=$|\\sqrt)", answer):
        raise MalformedError(answer)
    return ROOT_WITHOUT_BRACES.sub(r"\\sqrt{\1}", answer)


def _with_braced_fractions(answer: str) -> str:
    r"""Add the braces of `\frac12` and `\frac1{2}`; unchanged if a `\frac` is followed by a single character."""
    first, *fractions = answer.split(r"\frac")
    spelled = [first]
    for fraction in fractions:
        if not fraction:
            raise MalformedError(answer)
        if fraction.startswith("{"):
            spelled.append(fraction)
        elif len(fraction) == 1:
            return answer
        elif fraction[1] == "{":
            spelled.append(f"{{{fraction[0]}}}{fraction[1:]}")
        else:
            spelled.append(f"{{{fraction[0]}}}{{{fraction[1]}}}{fraction[2:]}")
    return r"\frac".join(spelled)
