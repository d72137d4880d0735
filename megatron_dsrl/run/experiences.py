"""A step's responses as the experience of each objective."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_dsrl.algorithms.experience import Experience, Response, build_experience
from megatron_dsrl.algorithms.reward_shaping import shape_rewards
from megatron_dsrl.config.data import OverlongConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.data.tokenizer import context_token_ids


@dataclass(frozen=True)
class ExperienceBuilder:
    """Shapes rewards and gives each space its context."""

    tokenizer: PreTrainedTokenizerBase
    overlong: OverlongConfig | None
    """Penalty of overlong responses; None: no penalty."""
    max_response_tokens: int

    def build(self, responses: Sequence[Response], phase: PhaseConfig) -> list[Experience]:
        """One experience per objective of the phase, in the order of its objectives."""
        shaped = shape_rewards(responses, self.overlong, self.max_response_tokens)
        return [
            build_experience(shaped, objective.space, context_token_ids(self.tokenizer, objective.space.context_text))
            for objective in phase.objectives.values()
        ]
