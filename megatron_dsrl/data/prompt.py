"""A prompt: a problem that is ready to be sampled from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A problem that is ready to be sampled from."""

    index: int
    """Row number in its prompt set."""

    text: str
    """The rendered chat prompt, for display."""

    token_ids: tuple[int, ...]
    """The prompt as the engine and the trainer see it."""

    answer: str
    """Gold answer for the verifier."""

    other_answers: tuple[str, ...] = ()
    """Further gold answers; any of them is accepted."""
