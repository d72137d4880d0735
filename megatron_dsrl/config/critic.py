"""The critic and the reference policy: models beside the policy that some phases need."""

from pydantic import Field

from megatron_dsrl.config.actor import OptimizerConfig
from megatron_dsrl.config.section import Section


class CriticConfig(Section):
    """A value model of the policy's architecture and layout, for phases whose advantages need values (PPO).

    Only built if there is such a phase; it then takes as much memory as the policy and its optimizer.
    """

    path: str | None = None
    """Folder that the critic starts from: a policy (the value head is then zero), or a token classifier with one
    label, whose `score` becomes the value head; null: `model.path`."""

    value_clip: float | None = Field(default=0.2, gt=0)
    """PPO's value clipping: moving further than this from the value before the update earns nothing; null turns it
    off."""

    mini_batches_per_rollout: int = Field(default=1, ge=1)
    """Number of parts a rollout batch is split into, with one optimizer step each."""

    epochs_per_rollout: int = Field(default=1, ge=1)
    """Passes over a rollout batch."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps at the beginning of the run in which only the critic learns. They need a phase that uses it."""

    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """The critic's AdamW, learning-rate schedule and gradient clipping."""

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """Optimizer steps on every rollout batch."""
        return self.mini_batches_per_rollout * self.epochs_per_rollout


class ReferenceConfig(Section):
    """The policy that KL terms compare with; initially the run's initial weights.

    Its weights are kept in host memory, and only if a phase needs them.
    """

    refresh_at_phase_switch: bool = False
    """Copy the policy's weights before the first step of every phase but the first."""

    refresh_every_steps: int | None = Field(default=None, ge=1)
    """Copy the policy's weights every n steps; null: never."""
