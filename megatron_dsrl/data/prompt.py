"""A prompt: a problem that is ready to be sampled from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A problem that is ready to be sampled from."""

    index: int
    """Row number in its prompt set. In a mixture, numbering continues from set to set, so numbers are unique."""

    text: str
    """The rendered chat prompt, for display."""

    token_ids: tuple[int, ...]
    """The prompt as the engine and the trainer see it."""

    answer: str
    """Gold answer for the verifier."""

    other_answers: tuple[str, ...] = ()
    """Other gold answers that are accepted."""

    prompt_set: str = ""
    """Name of its set in a mixture; empty if the run has only one."""

    pass_rate: float | None = None
    """Share of right responses in earlier recorded rollouts (`data.pass_rates_from`); None if unknown."""
