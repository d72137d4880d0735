"""What happens after which step of a run."""

from dataclasses import dataclass

from megatron_dsrl.config.run import CheckpointConfig, EvaluationConfig


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
