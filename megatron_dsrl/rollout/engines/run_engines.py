"""The engines of a run: those that it starts, or those of `engine.urls`."""

from contextlib import AbstractContextManager
from pathlib import Path

from megatron_dsrl.common.collective import world_size
from megatron_dsrl.common.waiting import waiting
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.platform import current_platform
from megatron_dsrl.rollout.engines.engine_group import EngineGroup
from megatron_dsrl.rollout.engines.engine_protocol import Engines
from megatron_dsrl.rollout.engines.external_engines import ExternalEngines
from megatron_dsrl.rollout.engines.server_arguments import initial_weight_version
from megatron_dsrl.rollout.engines.starting_server import StartingServer


def make_engines(config: RolloutSettings, run_folder: Path, starting: StartingServer | None) -> Engines:
    """Engines on the trainer's devices, or those of `engine.urls`. Every rank.

    Args:
        starting: process that becomes this rank's server; None: a new one.
    """
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
        return waiting(f"waiting for {_engines(len(config.engine.urls))}", f"engine.urls, {limit}")
    count = _engines(world_size() // config.engine.tensor_parallel_size)
    return waiting(f"starting {count}", f"{current_platform().usual_engine_start}; log: {run_folder / 'engines'}")


def _engines(count: int) -> str:
    return "1 engine" if count == 1 else f"{count} engines"
