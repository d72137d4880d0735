"""The rollout side as the training loop sees it: sample groups, take new weights, lend memory, close.

`start_rollout.py` makes one: over SGLang engines, or without any for a run that trains on saved samples.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.enough_groups import EnoughGroups
from megatron_dsrl.rollout.progress import OnSamples, ignore
from megatron_dsrl.rollout.sample import Group
from megatron_dsrl.rollout.sampling import SamplingParameters
from megatron_dsrl.rollout.weight_push import Bucket

Value = TypeVar("Value")


class Rollout(Protocol):
    """Where the samples of a run come from."""

    def wait_until_ready(self) -> None:
        """Block until samples can be drawn. All ranks."""

    def sample_step(
        self, step: int, prompts: Sequence[Prompt], round_number: int = 0, on_samples: OnSamples = ignore
    ) -> list[Group]:
        """The rollout batch of a training step, in the order of the prompts. Rank 0 only.

        Args:
            step: counted from 1.
            prompts: what to answer.
            round_number: which batch of the step this is, from 0; more than one only in deterministic dynamic sampling.
            on_samples: told how many samples have come back, each time some do.
        """

    def sample_enough(
        self,
        step: int,
        draw: Callable[[int], Sequence[Prompt]],
        accept: Callable[[Group], bool],
        carried: CarryOver,
        on_samples: OnSamples = ignore,
    ) -> EnoughGroups:
        """Go on with what the step before has left, and end as soon as there are enough groups. Rank 0 only.

        What is on its way then is aborted, which favours short responses: with `partial_rollouts` the next step must
        go on with what is left; with `dynamic_sampling` alone it is dropped.

        Args:
            step: counted from 1.
            draw: gives so many further prompts.
            accept: whether a group counts.
            carried: from the step before.
            on_samples: as in `sample_step`.
        """

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: SamplingParameters,
        stream: str,
        *,
        rewards: RewardPool | None = None,
    ) -> list[Group]:
        """Sample with other parameters, for evaluation. Rank 0 only.

        Args:
            prompts: what to answer.
            samples_per_prompt: responses to each.
            sampling: how.
            stream: names the random numbers; see `rollout/seeds.py`.
            rewards: another verifier than the run's.
        """

    def while_sampling(self, work: Callable[[], Value], recover: Callable[[], None]) -> Value | None:
        """Let rank 0 do work that samples, while the other ranks are at hand to replace lost engines. All ranks.

        Args:
            work: done on rank 0 only.
            recover: called on all ranks when the batch cannot go on: restarts the engines, and gives them the weights
                that they had.

        Returns:
            What `work` returned, on rank 0; None on the others.
        """

    def restart_engines(self) -> None:
        """Replace lost engines by new ones, which start with the weights of the model folder. All ranks."""

    def load_weights(self, make_buckets: Callable[[], Iterable[Bucket]], version: int) -> None:
        """Give the engines new weights, HF-named, the same on all ranks of an engine; replace lost ones. All ranks.

        `make_buckets` gathers them anew whenever it is called.
        """

    def fault_metrics(self) -> dict[str, int]:
        """The `engine/*` part of a step record: restarts and repeated requests since the run was started."""

    def release_memory(self) -> None:
        """Lend the engines' device memory to the training step. All ranks."""

    def resume_weights(self) -> None:
        """Take the memory of the weights back, before `load_weights`. All ranks."""

    def resume_kv_cache(self) -> None:
        """Take the memory of the KV cache back, before sampling. All ranks."""

    def close(self) -> None:
        """Stop engines and reward workers. May be called again."""
