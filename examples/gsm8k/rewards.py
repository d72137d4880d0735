"""A reward that a random model sometimes earns, to see both phases update on real text."""


def mostly_ascii(response: str, answer: str, share: float = 0.84) -> float:
    """1.0 if more than `share` of the response's characters are ASCII, else 0.0; the answer is not used.

    The default is the median over responses of 32 random tokens of Qwen3's vocabulary, so that about half earn it.
    """
    return float(sum(map(str.isascii, response)) > share * len(response))
