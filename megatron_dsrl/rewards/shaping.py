"""Rewards that are independent of the answer: for the form and the length of a response, or none at all."""

from megatron_dsrl.rewards.boxed import BOX, THINK_END, THINK_START, after_thinking, last_boxed


def box_format(response: str, answer: str) -> float:
    """1.0 when the response has exactly one box, closed and not empty, and no stray thinking tags, else 0.0.

    Args:
        response: the model's text. Thinking may come first, once, from `<think>` to `</think>`.
    """
    tags = response.count(THINK_START), response.count(THINK_END)
    thinking_is_well_formed = tags == (0, 0) or (tags == (1, 1) and response.lstrip().startswith(THINK_START))
    text = after_thinking(response)
    return float(thinking_is_well_formed and len(BOX.findall(text)) == 1 and bool(last_boxed(text)))


def zero(response: str, answer: str) -> float:
    """0 for every response, for a `rollout.generate` that records the rewards itself."""
    return 0.0


def length_penalty(response: str, answer: str, free_characters: int, max_characters: int) -> float:
    """0 up to `free_characters`, then falling linearly to -1 at `max_characters` and beyond.

    A verifier sees text, so lengths are in characters, thinking included. DAPO's overlong reward shaping counts tokens
    and is not part of the verifier.

    Args:
        free_characters: longest length without a penalty.
        max_characters: length from which the penalty is full.

    Raises:
        ValueError: `max_characters` is not above `free_characters`.
    """
    if max_characters <= free_characters:
        raise ValueError(f"max_characters = {max_characters} must be above free_characters = {free_characters}")
    over = len(response) - free_characters
    return -min(1.0, max(0.0, over / (max_characters - free_characters)))
