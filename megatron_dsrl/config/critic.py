"""The critic and the reference policy: models beside the policy that some phases need."""

from pydantic import Field

from megatron_dsrl.config.actor import OptimizerConfig
from megatron_dsrl.config.section import Section


class CriticConfig(Section):
    """A value model of the policy's architecture and layout, for phases whose advantages need values (PPO).

    It is built only if there is such a phase, and then takes as much memory as the policy and its optimizer do.
    """

    path: str | None = None
    """Folder that the critic starts from: of a policy (its value head is then zero), or of a token classifier with one
    label, whose `score` becomes the value head; null takes `model.path`."""

    value_clip: float | None = Field(default=0.2, gt=0)
    """A new value earns nothing by moving further than this from the one before the update; null turns that off."""

    mini_batches_per_rollout: int = Field(default=1, ge=1)
    """Parts of a rollout batch with an optimizer step on each."""

    epochs_per_rollout: int = Field(default=1, ge=1)
    """Passes over a rollout batch."""

    warmup_steps: int = Field(default=0, ge=0)
    """First steps of the run in which only the critic learns; they need a phase that uses it."""

    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig(learning_rate=1e-5))
    """Its own AdamW, learning-rate schedule and gradient clipping."""

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """Optimizer steps on every rollout batch."""
        return self.mini_batches_per_rollout * self.epochs_per_rollout


class ReferenceConfig(Section):
    """The policy that KL terms compare with: at first the initial weights of the run.

    Its weights are kept in host memory, only if some phase needs them.
    """

    refresh_at_phase_switch: bool = False
    """Take over the policy's weights before the first step of every phase but the first."""

    refresh_every_steps: int | None = Field(default=None, ge=1)
    """Take over the policy's weights after every so many steps; null: never."""
