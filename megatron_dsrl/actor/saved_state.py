"""A model's part of a checkpoint: weights, optimizer, learning-rate schedule and random states, saved with Megatron's
distributed checkpointing.

Every rank writes and reads its own shards. The optimizer state is stored by parameter, not by rank
(`fully_reshardable`), so another tensor-, pipeline- or data-parallel layout can read it. Random states belong to ranks
and are restored only if the layout is the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dsrl.actor.optimizer import chained_optimizers, own_step_counts
from megatron_dsrl.checkpoint.megatron_writer import CheckpointWrite, begin_checkpoint
from megatron_dsrl.model.build import bare_model
from megatron_dsrl.weights.untrusted_checkpoint import only_plain_objects


def begin_save(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    copy: bool,
) -> CheckpointWrite:
    """Prepare to write the state into an existing, empty folder. Collective.

    Args:
        chunks: this stage's model chunks.
        scheduler: learning-rate schedule of the optimizer.
        copy: copy the state, so that training may continue before it is written.
    """
    state = _model_and_optimizer(chunks, optimizer, is_loading=False)
    state["scheduler_steps"] = scheduler.num_steps
    state["random_states"] = _random_states()
    return begin_checkpoint(state, folder, _sharding_metadata(), copy)


def load_state(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    same_layout: bool,
) -> None:
    """Load what `begin_save` wrote, under this or another layout. Collective.

    Args:
        chunks: model chunks to fill.
        optimizer: its state is overwritten.
        scheduler: continues from the saved step count, with its own learning rates.
        same_layout: whether the checkpoint was written by the same number of processes in the same layout.
    """
    state = _model_and_optimizer(chunks, optimizer, is_loading=True)
    if same_layout:
        state["random_states"] = _random_states()
    with only_plain_objects(folder):
        loaded = dist_checkpointing.load(state, str(folder))
    for name, chunk in _named(chunks):
        bare_model(chunk).load_state_dict(loaded[name])
    if any(isinstance(part.optimizer, torch.optim.AdamW) for part in chained_optimizers(optimizer)):
        _add_missing_step_counts(loaded["optimizer"])
    optimizer.load_state_dict(loaded["optimizer"])
    own_step_counts(optimizer)
    scheduler.num_steps = loaded["scheduler_steps"]
    scheduler.step(increment=0)
    if same_layout:
        _restore_random_states(loaded["random_states"])


def begin_save_weights(folder: Path, chunks: Sequence[torch.nn.Module]) -> CheckpointWrite:
    """Prepare to write a copy of the weights alone into an existing, empty folder. Collective."""
    return begin_checkpoint(_model(chunks), folder, _sharding_metadata(), copy=True)


def load_saved_weights(folder: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Load what `begin_save_weights` wrote, under this or another layout, into the chunks. Collective."""
    with only_plain_objects(folder):
        loaded = dist_checkpointing.load(_model(chunks), str(folder))
    for name, chunk in _named(chunks):
        bare_model(chunk).load_state_dict(loaded[name])


def _model_and_optimizer(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer, is_loading: bool
) -> dict[str, Any]:
    state = _model(chunks)
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=_layout_metadata())
    return state


def _model(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    metadata = _layout_metadata()
    return {name: bare_model(chunk).sharded_state_dict(metadata=metadata) for name, chunk in _named(chunks)}


def _layout_metadata() -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return _sharding_metadata() | {"dp_cp_group": group}


def _sharding_metadata() -> dict[str, Any]:
    """How Megatron names and splits tensors in the checkpoint; resharding requires all three settings."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _named(chunks: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """Megatron's names: `model`, or `model0`, `model1`... for the chunks of virtual pipeline stages."""
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _add_missing_step_counts(state: dict[str, Any]) -> None:
    """Megatron omits the parameters' common step count from a checkpoint while it is 0, but torch's AdamW requires
    it."""
    if "param_groups" in state and "state" in state:
        state["state"].setdefault("common_step", torch.zeros(()))
        return
    for part in state.values():
        if isinstance(part, dict):
            _add_missing_step_counts(part)


def _random_states() -> ShardedObject:
    states = {"torch": torch.get_rng_state(), "megatron": tensor_parallel.get_cuda_rng_tracker().get_states()}
    return ShardedObject("random_states", states, (dist.get_world_size(),), (dist.get_rank(),))


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])
