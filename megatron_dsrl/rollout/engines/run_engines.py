"""The engines of a run: those that it starts (`EngineGroup`), or those of `engine.urls` (`ExternalEngines`)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from megatron_dsrl.common.collective import world_size
from megatron_dsrl.common.numbers import counted
from megatron_dsrl.common.waiting import waiting
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.platform import current_platform
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import MemoryTag
from megatron_dsrl.rollout.engines.engine_group import EngineGroup
from megatron_dsrl.rollout.engines.external_engines import ExternalEngines
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.engines.server_arguments import initial_weight_version
from megatron_dsrl.rollout.engines.server_process import ServerProcess


class Engines(Protocol):
    """All engines of a run. To add an engine other than SGLang, or another way to run it, implement this.

    Every rank holds one object. Every method but `lose` and `close` is collective, and raises on every rank.
    """

    addresses: list[EngineAddress]
    """By engine number, the same on every rank; empty before the engines are ready."""
    restarts: int
    """Number of engine restarts so far, over all engines; the same on every rank."""

    def start(self) -> None:
        """Start the engines and return without waiting for them. Raises UserError if any cannot be started."""

    def wait_until_ready(self) -> None:
        """Block until all engines answer.

        Raises:
            UserError: an engine exited with a message, or an external one is not ready in time.
            EngineError: an engine was killed or late `engine.max_restarts` times too often.
        """

    def lose(self, problems: Mapping[int, str]) -> None:
        """Mark engines as lost: why, by engine number. They are not called again before `restart_lost` or `load`.

        Every rank passes the same problems.
        """

    def restart_lost(self) -> None:
        """Restart lost engines, or wait for their owner to. `load` must follow before sampling.

        Raises:
            EngineError: an engine was restarted too often.
            UserError: an external engine does not come back in time.
        """

    def load(self, make_buckets: Callable[[], Iterable[Bucket]], version: int) -> None:
        """Replace the weights of all engines. Engines that were lost before, or are lost here, are restarted.

        Args:
            make_buckets: gathers the weights again each time it is called; collective over all ranks.

        Raises:
            EngineError: like `restart_lost`.
            UserError: an engine does not hold what it was sent (see `engine.check_weights`).
        """

    def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Have all engines give device memory back to the trainer. An engine that fails is lost."""

    def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Have all engines take released memory again. An engine that fails is lost."""

    def close(self) -> None:
        """Release the engines. May be called again."""


def make_engines(config: RolloutSettings, run_folder: Path, starting: ServerProcess | None) -> Engines:
    """The engines that the configuration asks for. `starting` becomes this rank's server; None: a new process. Every
    rank calls it."""
    if config.engine.urls:
        return ExternalEngines(config, initial_weight_version(config))
    return EngineGroup(config, run_folder, starting)


def awaiting_engines(config: RolloutSettings, run_folder: Path) -> AbstractContextManager[None]:
    """Context for the block that waits for the engines: rank 0 tells the user. Every rank enters it."""
    if config.rollout.replay_from is not None:
        return waiting("no engine is started: samples are replayed", config.rollout.replay_from)
    if config.rollout.source == "dataset":
        return waiting("no engine is started: the data set has the responses")
    limit = f"limit {config.engine.startup_timeout_seconds:g} s"
    if config.engine.urls:
        return waiting(f"waiting for {counted(len(config.engine.urls), 'engine')}", f"engine.urls, {limit}")
    count = counted(world_size() // config.engine.tensor_parallel_size, "engine")
    return waiting(f"starting {count}", f"{current_platform().usual_engine_start}; log: {run_folder / 'engines'}")
