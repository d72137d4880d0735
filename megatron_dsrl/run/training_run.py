"""The parts of a training run that its loop moves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_dsrl.algorithms.experience import Experience, Response, build_experience
from megatron_dsrl.algorithms.reward_shaping import shape_rewards
from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.config.data import OverlongConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import CheckpointConfig, EvaluationConfig
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
class Due:
    """Each of these is also due after the last step."""

    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    last_step: int

    def save(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return is_due(step, self.checkpoint.save_every_steps, self.last_step)

    def export(self, step: int) -> bool:
        """Whether an export in Hugging Face's format is due after this step."""
        return step > 0 and is_due(step, self.checkpoint.export_hf_every_steps, self.last_step)

    def evaluate(self, step: int) -> bool:
        """Whether an evaluation is due after this step; 0 is before training."""
        return step == 0 or is_due(step, self.evaluation.interval_at(step), self.last_step)


def is_due(step: int, every_steps: int | None, last_step: int) -> bool:
    """Whether something that happens every `every_steps` steps, and after the last one, is due after this step."""
    return step == last_step or (every_steps is not None and step % every_steps == 0)


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
