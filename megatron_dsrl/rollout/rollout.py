"""The rollout side as the training loop sees it: it samples a step, takes new weights, and lends its memory.

`EngineRollout` samples with SGLang engines, in one of the modes of `step_sampling.py`; `ReplayRollout` reads the
recorded samples of another run, and `DatasetRollout` the responses of a data set.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from megatron_dsrl.algorithms.experience import Response
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.batch import BatchSampler, OnSamples, ignore
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.sample import SampleGroup, SamplingParameters
from megatron_dsrl.rollout.unfinished import CarryOver

Draw = Callable[[int], Sequence[Prompt]]
"""draw(n) returns the next n prompts."""
Watch = Callable[[int, int], AbstractContextManager[OnSamples]]
"""watch(step, n) is a context that shows the progress of n samples for this step."""

Value = TypeVar("Value")


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
    commit: Callable[[], None] = ignore
    """Called once the step is certain to be trained on: its groups leave what is carried over. Until then an
    interrupted step can start over with what it had."""

    @property
    def sampled(self) -> list[SampleGroup]:
        return self.groups + self.others


class Rollout(Protocol):
    """Where the samples of a run come from."""

    training_sampling: SamplingParameters
    carried: CarryOver
    """State from the last step for the next one; saved in checkpoints and restored from them. Rank 0 only."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: SamplingParameters,
        stream: str,
        *,
        rewards: RewardPool | None = None,
    ) -> list[SampleGroup]:
        """One judged group per prompt, in the order of the prompts. Rank 0 only.

        Args:
            stream: names the random numbers; see `rollout/seeds.py`.
            rewards: used instead of the run's verifier.
        """

    def wait_until_ready(self) -> None:
        """Block until samples can be drawn. All ranks."""

    def sample_step(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """The judged groups of a training step, counted from 1; `commit` them before the next one. Rank 0 only."""

    def while_sampling(self, work: Callable[[], Value], recover: Callable[[], None]) -> Value | None:
        """Run work that samples on rank 0, while the other ranks stand by to restart lost engines. All ranks.

        `recover` is called on all ranks when the batch cannot continue; it must restart the engines with the weights
        that they had. Returns the result of `work` on rank 0, and None on the others.
        """

    def load_weights(self, make_buckets: Callable[[], Iterable[Bucket]], version: int) -> None:
        """Give the engines new HF-named weights, the same on all ranks of an engine; restart lost ones. All ranks.

        `make_buckets` gathers the weights again each time it is called.
        """

    def engine_metrics(self) -> dict[str, int | float]:
        """The `engine/*` metrics of a step record: restarts and retried requests since the run was started, and the
        share of the time since the last call in which an engine had no request. Rank 0 only."""

    def release_memory(self) -> None:
        """Lend the engines' device memory to the training step. All ranks."""

    def resume_weights(self) -> None:
        """Take the weights' memory back, before `load_weights`. All ranks."""

    def resume_kv_cache(self) -> None:
        """Take the KV cache's memory back, before sampling. All ranks."""

    def close(self) -> None:
        """Stop engines and reward workers. May be called again."""


class StepSampling(ABC):
    """One way to sample the groups of a step."""

    def __init__(self, config: RolloutSettings, engines: BatchSampler) -> None:
        self._config = config
        self._engines = engines
        self.carried = CarryOver()
        """State from the last step for the next one. Saved in checkpoints; set when a run resumes."""

    @abstractmethod
    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """The judged groups of a step, counted from 1; `commit` them before the next one."""

    def _accepts(self, group: SampleGroup) -> bool:
        """Whether a step may train on the group."""
        return group.rewards_differ or not self._config.rollout.dynamic_sampling

    def close(self) -> None:  # noqa: B027
        """End what runs in the background; most modes have nothing to end."""


def dynamic_sampling_metrics(
    kept: Sequence[SampleGroup], others: Sequence[SampleGroup], wanted: int
) -> dict[str, int | float]:
    """The `dynamic_sampling/*` metrics that several modes have in common, given the groups that are trained on, the
    other completed ones, and the number that the step should train on."""
    return {
        "dynamic_sampling/sampled_groups": len(kept) + len(others),
        "dynamic_sampling/surplus_groups": sum(group.rewards_differ for group in others),
        "dynamic_sampling/missing_groups": wanted - len(kept),
    }


def responses_of(groups: Sequence[SampleGroup], weight_version: int) -> list[Response]:
    """The samples of all groups, in order, in the form that the algorithms take. They update the weights of
    `weight_version`; tokens of earlier versions are marked as older."""
    return [
        Response(
            prompt_ids=group.prompt.token_ids,
            response_ids=sample.response_ids,
            engine_log_probs=sample.log_probs,
            reward=sample.reward,
            group=number,
            truncated=sample.finish_reason == "length",
            older_tokens=sample.tokens_before(weight_version),
            routed_experts=sample.routed_experts,
            scored=sample.scored,
        )
        for number, group in enumerate(groups)
        for sample in group.samples
    ]
