"""What every mode of sampling gets and returns; the modes are in `step_sampling.py`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.batch import BatchSampler
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.progress import OnSamples, ignore
from megatron_dsrl.rollout.sample import SampleGroup

Draw = Callable[[int], Sequence[Prompt]]
"""draw(n) returns the next n prompts."""
Watch = Callable[[int, int], AbstractContextManager[OnSamples]]
"""watch(step, n) is a context that shows the progress of n samples for this step."""


def unwatched(step: int, samples: int) -> AbstractContextManager[OnSamples]:
    """A `Watch` that shows nothing."""
    return nullcontext(ignore)


@dataclass(frozen=True)
class StepSamples:
    """The rollout of a step."""

    groups: list[SampleGroup]
    """The groups to train on."""
    others: list[SampleGroup] = field(default_factory=list)
    """Completed groups that are not trained on (dynamic sampling and partial rollouts only)."""
    metrics: dict[str, int | float] = field(default_factory=dict)
    """The `dynamic_sampling/*`, `partial_rollouts/*` or `asynchronous/*` metrics of the step record."""
    generated_tokens: int = 0
    """Response tokens that the engines produced for this step."""
    seconds: float = 0.0
    """Wall time of sampling, including overlapping verification; asynchronously, the time since the last step's."""
    judged: bool = True
    """Whether a verifier has scored the samples; not those of a data set."""

    @property
    def sampled(self) -> list[SampleGroup]:
        """All completed groups."""
        return self.groups + self.others


class StepSampling(ABC):
    """One way to sample the groups of a step."""

    def __init__(self, config: RolloutSettings, engines: BatchSampler) -> None:
        self._config = config
        self._engines = engines
        self.carried = CarryOver()
        """State from the last step for the next one. Saved in checkpoints; set when a run resumes."""

    @abstractmethod
    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """The judged groups of a step, counted from 1."""

    def close(self) -> None:  # noqa: B027
        """End what runs in the background; most modes have nothing to end."""


def samples_per_step(config: RolloutConfig) -> int:
    """Number of responses that a step trains on."""
    return config.prompts_per_step * config.samples_per_prompt


def is_mixed(group: SampleGroup) -> bool:
    """Whether the samples of a group have different rewards."""
    return len({sample.reward for sample in group.samples}) > 1


def dynamic_sampling_metrics(
    kept: Sequence[SampleGroup], others: Sequence[SampleGroup], wanted: int
) -> dict[str, int | float]:
    """The `dynamic_sampling/*` metrics that `MixedRounds` and `UntilMixed` have in common.

    Args:
        kept: the groups that are trained on.
        others: completed groups that are not.
        wanted: number of groups that the batch should have.
    """
    return {
        "dynamic_sampling/sampled_groups": len(kept) + len(others),
        "dynamic_sampling/surplus_groups": sum(map(is_mixed, others)),
        "dynamic_sampling/missing_groups": wanted - len(kept),
    }
