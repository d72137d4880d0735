"""The parts of a training run that its loop moves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_dsrl.algorithms.experience import Experience, Response, build_experience
from megatron_dsrl.algorithms.reward_shaping import shape_rewards
from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.config.data import OverlongConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import Due
from megatron_dsrl.data.tokenizer import context_token_ids
from megatron_dsrl.run.device_sharing import SharedDevice
from megatron_dsrl.run.models import RunModels
from megatron_dsrl.run.reporting import Reporting
from megatron_dsrl.run.sampling import Sampling
from megatron_dsrl.run.saving import Saving


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


@dataclass(frozen=True)
class TrainingRun:
    """One per rank. Each part has what it needs; only the loop has them all."""

    steps: range
    """Those that are left: from 1, or from the step after the checkpoint."""
    schedule: Schedule
    due: Due
    sampling: Sampling
    evaluate: Callable[[int], None]
    """Evaluates the policy after a step; all ranks."""
    experiences: ExperienceBuilder
    models: RunModels
    device: SharedDevice
    """Shared by the models and the rollout's engines."""
    saving: Saving
    reporting: Reporting
