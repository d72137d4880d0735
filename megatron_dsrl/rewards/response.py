"""The part of a response that counts: what comes after the thinking."""

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
