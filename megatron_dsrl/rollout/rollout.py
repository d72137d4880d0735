"""The rollout side as the training loop sees it: sample a step, take new weights, lend memory, close.

`EngineRollout` samples with SGLang engines; `ReplayRollout` reads the recorded samples of another run, and
`DatasetRollout` the responses of a data set.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.sample import SampleGroup, SamplingParameters
from megatron_dsrl.rollout.step_samples import Draw, StepSamples, Watch
from megatron_dsrl.rollout.unfinished import CarryOver

Value = TypeVar("Value")


class Generator(Protocol):
    """The part of the rollout side that evaluation needs."""

    @property
    def training_sampling(self) -> SamplingParameters:
        """Sampling parameters of training."""

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


class Rollout(Generator, Protocol):
    """Where the samples of a run come from."""

    carried: CarryOver
    """State from the last step for the next one; saved in checkpoints and restored from them. Rank 0 only."""

    def wait_until_ready(self) -> None:
        """Block until samples can be drawn. All ranks."""

    def sample_step(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """The judged groups of a training step, counted from 1. Rank 0 only."""

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
