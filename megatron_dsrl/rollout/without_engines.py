"""What the rollout sides that start no engine have in common: nothing to wait for, to push to, or to evaluate with."""

from collections.abc import Callable, Iterable

from megatron_dsrl.common.collective import rank
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.rollout import Value
from megatron_dsrl.rollout.sample import SampleGroup, SamplingParameters


class WithoutEngines:
    """A `Rollout` whose responses exist already, but for `sample_step`."""

    def __init__(self, sampling: SamplingParameters, setting: str) -> None:
        """
        Args:
            sampling: sampling parameters of training, which only tell the length limit here.
            setting: the configuration field that says where the responses are, for messages.
        """
        self.carried = CarryOver()
        self._sampling = sampling
        self._setting = setting

    @property
    def training_sampling(self) -> SamplingParameters:
        return self._sampling

    def generate(self, *request: object, **options: object) -> list[SampleGroup]:
        """
        Raises:
            UserError: always.
        """
        raise UserError(f"{self._setting} starts no engines: nothing can be sampled")

    def while_sampling(self, work: Callable[[], Value], recover: Callable[[], None]) -> Value | None:
        """Run the work on rank 0. All ranks."""
        return work() if rank() == 0 else None

    def engine_metrics(self) -> dict[str, int | float]:
        """None."""
        return {}

    # ---- no-ops without engines

    def wait_until_ready(self) -> None: ...

    def load_weights(self, make_buckets: Callable[[], Iterable[Bucket]], version: int) -> None: ...

    def release_memory(self) -> None: ...

    def resume_weights(self) -> None: ...

    def resume_kv_cache(self) -> None: ...

    def close(self) -> None: ...
