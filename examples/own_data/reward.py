"""A custom reward: part of the credit for a number close to the right one.

It has its own file, because reward workers do not load torch.
"""

from megatron_dsrl.rewards.boxed import boxed, boxed_answer


def close(response: str, answer: str, tolerance: float = 1.0, partial: float = 0.2) -> float:
    """1 for the right box, `partial` for a number no further than `tolerance` from the answer, else 0.

    Args:
        response: the model's text.
        answer: the gold answer, a number.
        tolerance: how far a number may be off for the partial credit.
        partial: the credit.
    """
    if boxed(response, answer) == 1.0:
        return 1.0
    try:
        distance = abs(float(boxed_answer(response) or "") - float(answer))
    except ValueError:  # no box, or no number in it
        return 0.0
    return partial if distance <= tolerance else 0.0
