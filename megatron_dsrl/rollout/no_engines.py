"""The rollout side of a run that trains on the saved samples of another one."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_dsrl.collective import rank
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.errors import UserError
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.enough_groups import EnoughGroups
from megatron_dsrl.rollout.progress import OnSamples, ignore
from megatron_dsrl.rollout.rollout import Value
from megatron_dsrl.rollout.sample import Group
from megatron_dsrl.rollout.sampling import SamplingParameters
from megatron_dsrl.rollout.weight_push import Bucket

NOTHING_SAMPLED = "rollout.replay_from starts no engines: nothing can be sampled"


class NoEngines:
    """For a run that trains on saved samples of another one: nothing is started, and nothing can be sampled."""

    def __init__(self, config: RunConfig, run_folder: Path) -> None:
        """
        Raises:
            UserError: The run folder has no saved rollouts, or the configuration asks for evaluation.
        """
        if not (run_folder / "rollouts").is_dir():
            raise UserError(f"rollout.replay_from: {run_folder} has no folder `rollouts`")
        if config.evaluation.sets:
            raise UserError("rollout.replay_from starts no engines, so evaluation.sets must be empty")

    def wait_until_ready(self) -> None:
        pass

    def sample_step(
        self, step: int, prompts: Sequence[Prompt], round_number: int = 0, on_samples: OnSamples = ignore
    ) -> list[Group]:
        raise UserError(NOTHING_SAMPLED)

    def sample_enough(
        self,
        step: int,
        draw: Callable[[int], Sequence[Prompt]],
        accept: Callable[[Group], bool],
        carried: CarryOver,
        on_samples: OnSamples = ignore,
    ) -> EnoughGroups:
        raise UserError(NOTHING_SAMPLED)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: SamplingParameters,
        stream: str,
        *,
        rewards: RewardPool | None = None,
    ) -> list[Group]:
        raise UserError(NOTHING_SAMPLED)

    def while_sampling(self, work: Callable[[], Value], recover: Callable[[], None]) -> Value | None:
        return work() if rank() == 0 else None

    def restart_engines(self) -> None:
        pass

    def load_weights(self, make_buckets: Callable[[], Iterable[Bucket]], version: int) -> None:
        pass

    def fault_metrics(self) -> dict[str, int]:
        return {}

    def release_memory(self) -> None:
        pass

    def resume_weights(self) -> None:
        pass

    def resume_kv_cache(self) -> None:
        pass

    def close(self) -> None:
        pass
