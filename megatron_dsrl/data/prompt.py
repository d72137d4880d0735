"""A prompt: a problem that is ready to be sampled from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A problem that is ready to be sampled from."""

    index: int
    """Row number in its prompt set."""

    text: str
    """The rendered chat prompt, for people to read."""

    token_ids: tuple[int, ...]
    """The same prompt as the engine and the trainer see it."""

    answer: str
    """Gold answer for the verifier."""

    other_answers: tuple[str, ...] = ()
    """Further gold answers, each of which is accepted as well."""
