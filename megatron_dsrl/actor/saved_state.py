"""A model's part of a checkpoint: weights, optimizer, learning-rate schedule and random states, saved with Megatron's
distributed checkpointing. With LoRA, only the adapters are saved: the other weights are those of `model.path`.

Every rank writes and reads its own shards. The optimizer state is stored by parameter, not by rank
(`fully_reshardable`), so another tensor-, pipeline- or data-parallel layout can read it. Random states belong to ranks
and are restored only if the layout is the same.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dsrl.actor.optimizer import chained_optimizers, own_step_counts
from megatron_dsrl.checkpoint.megatron_writer import CheckpointWrite, start_checkpoint
from megatron_dsrl.config.run import GatherOn
from megatron_dsrl.model.build import bare_model
from megatron_dsrl.model.lora import is_adapter
from megatron_dsrl.weights.load import is_extra_state
from megatron_dsrl.weights.untrusted_checkpoint import only_plain_objects


def start_save(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    gather_on: GatherOn,
    copy: bool,
) -> CheckpointWrite:
    """Prepare to write the state into an existing, empty folder. Collective.

    Args:
        gather_on: where the shards of the optimizer's state come together; see `CheckpointConfig.gather_optimizer_on`.
        copy: copy the state, so that training may continue before it is written.
    """
    on_host = {"distrib_optim_fully_reshardable_mem_efficient": gather_on == "host"}
    state = _model(chunks)
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=_layout_metadata() | on_host)
    state["scheduler_steps"] = scheduler.num_steps
    state["random_states"] = _random_states()
    return start_checkpoint(state, folder, _sharding_metadata(), copy)


def load_state(
    folder: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    same_layout: bool,
) -> None:
    """Load what `start_save` wrote, under this or another layout. Collective.

    The schedule continues from the saved step count, with its own learning rates. `same_layout`: whether the checkpoint
    was written by the same number of processes in the same layout.
    """
    state = _model(chunks)
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=True, metadata=_layout_metadata())
    if same_layout:
        state["random_states"] = _random_states()
    with only_plain_objects(folder):
        loaded = dist_checkpointing.load(state, str(folder))
    _fill(chunks, loaded)
    _complete(loaded["optimizer"], chained_optimizers(optimizer)[0].optimizer)
    optimizer.load_state_dict(loaded["optimizer"])
    own_step_counts(optimizer)
    scheduler.num_steps = loaded["scheduler_steps"]
    scheduler.step(increment=0)
    if same_layout:
        torch.set_rng_state(loaded["random_states"]["torch"])
        tensor_parallel.get_cuda_rng_tracker().set_states(loaded["random_states"]["megatron"])


def start_save_weights(folder: Path, chunks: Sequence[torch.nn.Module]) -> CheckpointWrite:
    """Prepare to write a copy of the weights alone into an existing, empty folder. Collective."""
    return start_checkpoint(_model(chunks), folder, _sharding_metadata(), copy=True)


def load_saved_weights(folder: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Load what `start_save_weights` wrote, under this or another layout, into the chunks. Collective."""
    with only_plain_objects(folder):
        loaded = dist_checkpointing.load(_model(chunks), str(folder))
    _fill(chunks, loaded)


def _model(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Sharded state of the chunks, without the layers' extra state: it is empty except in low-precision formats, and
    local and Transformer Engine layers keep it in different places."""
    metadata, model = _layout_metadata(), {}
    for name, chunk in _named(chunks):
        state = bare_model(chunk).sharded_state_dict(metadata=metadata)
        model[name] = {key: state[key] for key in _saved(state)}
    return model


def _fill(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Load the state of `_model` into the chunks."""
    for name, chunk in _named(chunks):
        expected = set(_saved(bare_model(chunk).state_dict()))
        result = bare_model(chunk).load_state_dict(loaded[name], strict=False)
        missing = expected & set(result.missing_keys)
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


def _saved(names: Iterable[str]) -> list[str]:
    """The entries of a model's state that go into checkpoints: all, or only the adapters if there are any."""
    weights = [name for name in names if not is_extra_state(name)]
    return [name for name in weights if is_adapter(name)] or weights


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


def _complete(state: dict[str, Any], adam: torch.optim.Optimizer) -> None:
    """Add what another implementation of Adam left out of a loaded state, in place.

    Fused implementations have their own settings in the parameter groups, and count steps there. torch's AdamW
    counts them by parameter, which Megatron stores once for all parameters, and not at all while the count is 0.
    `state` is an optimizer's, or holds such states by name.
    """
    if "param_groups" not in state:
        for part in state.values():
            if isinstance(part, dict):
                _complete(part, adam)
        return
    groups = state["param_groups"]
    for group in groups:
        for name, value in adam.defaults.items():
            group.setdefault(name, value)
    if "state" not in state:
        return  # the distributed optimizer's, which always has the count in its groups
    if isinstance(adam, torch.optim.AdamW):
        count = max((float(group["step"]) for group in groups if "step" in group), default=0.0)
        state["state"].setdefault("common_step", torch.tensor(count))
    elif "common_step" in state["state"]:
        count = int(state["state"].pop("common_step"))
        for group in groups:
            group.setdefault("step", count)


def _random_states() -> ShardedObject:
    states = {"torch": torch.get_rng_state(), "megatron": tensor_parallel.get_cuda_rng_tracker().get_states()}
    return ShardedObject("random_states", states, (dist.get_world_size(),), (dist.get_rank(),))
