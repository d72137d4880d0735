"""A custom reward. It has its own file, because reward workers do not load torch."""

from megatron_dsrl.rewards.boxed import boxed


def right_in_few_lines(response: str, answer: str, lines: int = 5, penalty: float = 0.1) -> float:
    """1 for the right box, less `penalty` for every line beyond `lines`, and 0 for a wrong one.

    Args:
        response: the model's text.
        answer: the gold answer.
        lines: that a solution may have without a penalty.
        penalty: for each additional line; the reward does not fall below 0.
    """
    extra = max(0, len(response.strip().splitlines()) - lines)
    return max(0.0, boxed(response, answer) - penalty * extra)
