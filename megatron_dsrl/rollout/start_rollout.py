"""Start the rollout side that a run's configuration asks for."""

from collections.abc import Sequence
from pathlib import Path

from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.rollout.dispatcher import Decode
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.no_engines import NoEngines
from megatron_dsrl.rollout.progress import OnCall, ignore


def start_rollout(
    config: RunConfig,
    run_folder: Path,
    stop_token_ids: Sequence[int],
    decode: Decode,
    on_call: OnCall = ignore,
) -> EngineRollout | NoEngines:
    """Start the rollout side; called on every rank, after torch.distributed where there is more than one.

    Engines start in the background: build the trainer meanwhile, then call `wait_until_ready`. On CUDA wait first,
    because SGLang sizes its memory by what is free.

    Args:
        config: The run.
        run_folder: Engine logs go to its `engines/`.
        stop_token_ids: Tokens that end a response (end of turn, end of text).
        decode: Token ids to text without special tokens.
        on_call: On rank 0, told of every call to an engine when it has ended.

    Raises:
        UserError: Something in the configuration cannot work. Nothing is left running.
    """
    if config.rollout.replay_from is not None:
        return NoEngines(config, Path(config.rollout.replay_from))
    return EngineRollout(config, run_folder, tuple(stop_token_ids), decode, on_call)
