"""The base models of the laboratory: a family of problems each, and how the model is trained. Does not import torch."""

from pydantic import Field

from examples.laboratory.task import ALTERNATIVELY, BEFORE, CHECK, NEED, NO, PHRASES, WAIT, YES, Family
from examples.tiny_dsrl.base_settings import DENSE
from megatron_dsrl.config.section import Section

CACHE = ".cache/laboratory"
VOCAB_SIZE = 160
PIECES = (
    *("system\n", "user\n", "assistant\n", "\n\n", "\\boxed{", "Make ", " from ", ", ", " is ", " is not ", ". "),
    *(*PHRASES, WAIT, ALTERNATIVELY, CHECK, NEED, BEFORE, YES, NO),
)
"""Strings that are one token: every fixed part of a problem or a response."""

ARCHITECTURE = DENSE | {"vocab_size": VOCAB_SIZE, "intermediate_size": 512}
"""Qwen3 with 1.0 million parameters."""


class BaseSettings(Section):
    """Everything that decides what `make_base` makes."""

    family: Family = Field(default_factory=Family)
    """Problems and documents."""

    seed: int = 1
    """Seed of the documents, the problems and the initial weights."""

    steps: int = Field(default=1200, ge=2)
    """Optimizer steps of both stages."""

    documents_per_step: int = Field(default=24, ge=1)
    """Documents of one step."""

    patient_part: float = Field(default=0.75, ge=0, le=1)
    """Part of the steps, the first ones, that see patient documents."""

    learning_rate: float = Field(default=1.5e-3, gt=0)
    """Peak learning rate; it decays linearly to zero."""

    train_problems: int = Field(default=800, ge=1)
    """Problems for RL; the same numbers in another order are another problem."""

    held_out_problems: int = Field(default=128, ge=1)
    """Problems for evaluation."""

    @property
    def patient_steps(self) -> int:
        """Steps of the first stage."""
        return round(self.patient_part * self.steps)


PAPER_LIKE = Family()
"""Closest to the paper: little of a response is explained by the prompt alone, most mistakes are visible in it, half of
the hasty documents have no prompt."""

BASES = {
    "paper_like": BaseSettings(family=PAPER_LIKE),
    "hidden": BaseSettings(family=PAPER_LIKE.model_copy(update={"visible": 0.1})),
    "restated": BaseSettings(family=PAPER_LIKE.model_copy(update={"restates_problem": True})),
    "restated_hidden": BaseSettings(family=PAPER_LIKE.model_copy(update={"restates_problem": True, "visible": 0.1})),
    "prompted": BaseSettings(family=PAPER_LIKE.model_copy(update={"unprompted": 0.1})),
    "longer": BaseSettings(family=PAPER_LIKE.model_copy(update={"numbers": 4, "insight": 0.1}), steps=1600),
    "small": BaseSettings(
        family=PAPER_LIKE.model_copy(update={"numbers": 2, "wording": 1}),
        steps=120,
        documents_per_step=16,
        train_problems=40,
        held_out_problems=8,
    ),
}
"""By name: the setting of the comparison, the cells of the map beside it, and the one of the fast test."""
