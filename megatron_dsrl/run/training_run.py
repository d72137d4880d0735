"""The parts of a training run that its loop moves."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.run.device_sharing import SharedDevice
from megatron_dsrl.run.due import Due
from megatron_dsrl.run.experiences import ExperienceBuilder
from megatron_dsrl.run.models import RunModels
from megatron_dsrl.run.reporting import Reporting
from megatron_dsrl.run.sampling import Sampling
from megatron_dsrl.run.saving import Saving


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
