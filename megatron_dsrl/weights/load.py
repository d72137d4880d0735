"""Load an HF checkpoint, or a Megatron distributed checkpoint of any layout, into a sharded model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_dsrl.common.collective import rank, together, world_size
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.build import bare_model
from megatron_dsrl.model.lora import is_adapter
from megatron_dsrl.weights.bind import bind
from megatron_dsrl.weights.checkpoint_record import check_record
from megatron_dsrl.weights.checkpoint_shapes import check_hf_checkpoint, check_megatron_checkpoint
from megatron_dsrl.weights.hf_checkpoint import HfCheckpoint, NoWeights
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint, is_megatron_checkpoint
from megatron_dsrl.weights.table import TableEntry, WeightTable
from megatron_dsrl.weights.untrusted_checkpoint import only_plain_objects


def load_weights(chunks: Sequence[nn.Module], table: WeightTable, folder: Path) -> None:
    """Fill this rank's parameters from an HF folder or a Megatron distributed checkpoint. Collective.

    Raises:
        UserError: see `load_hf_weights` and `load_megatron_weights`.
    """
    if is_megatron_checkpoint(folder):
        load_megatron_weights(chunks, table, folder)
    else:
        load_hf_weights(chunks, table, folder)


def load_megatron_weights(chunks: Sequence[nn.Module], table: WeightTable, folder: Path) -> None:
    """Fill this rank's parameters with Megatron's own loading, which reshards to the current layout. Collective.

    Raises:
        UserError: the checkpoint is damaged, its config.json differs from the recorded one, or a tensor is missing,
            unexpected or of the wrong shape.
    """
    if (folder / "config.json").exists():  # a run's checkpoint has neither that nor a record
        check_record(folder, read_architecture(folder))
    checkpoint = MegatronCheckpoint(folder)
    check_megatron_checkpoint(checkpoint, table)
    together(lambda: checkpoint.check_chunks(rank(), world_size()))
    models = [bare_model(chunk) for chunk in chunks]
    wanted = {f"model{i}": _sharded_parameters(model) for i, model in enumerate(models)}
    with only_plain_objects(folder):
        loaded = dist_checkpointing.load(wanted, str(folder))
    for i, model in enumerate(models):
        result = model.load_state_dict(loaded[f"model{i}"], strict=False)
        missing = [name for name in result.missing_keys if not is_extra_state(name) and not is_adapter(name)]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


def _sharded_parameters(model: GPTModel) -> dict[str, Any]:
    """The model's sharded state without LoRA adapters, which are not in a model's files, and without the layers' extra
    state, which is empty except in low-precision formats."""
    metadata = {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = model.sharded_state_dict(metadata=metadata)
    return {name: value for name, value in state.items() if not is_extra_state(name) and not is_adapter(name)}


def is_extra_state(name: str) -> bool:
    """Whether an entry of a model's state is a layer's extra state: `..._extra_state`, in Transformer Engine's experts
    also with a number after it."""
    return "_extra_state" in name


def load_hf_weights(chunks: Sequence[nn.Module], table: WeightTable, folder: Path) -> None:
    """Fill this rank's parameters from the safetensors of an HF folder, reading only the tensors it needs.

    Call it before building the optimizer, which copies the parameters into its fp32 master weights. Values are cast to
    the parameters' dtype.

    Raises:
        UserError: weights are missing or damaged, a tensor is missing, unexpected or of the wrong shape, or a tied head
            differs from the embedding.
    """
    try:
        checkpoint = HfCheckpoint(folder)
    except NoWeights as error:
        raise UserError(f"{error}. A run can also start from random weights: model.random_init=true") from error
    check_hf_checkpoint(checkpoint, table)
    fill(chunks, table, checkpoint.read)


@torch.no_grad()
def fill(chunks: Sequence[nn.Module], table: WeightTable, read: Callable[[str], Tensor]) -> None:
    """Fill this rank's parameters from full HF tensors.

    Args:
        chunks: GPTModel chunks of this pipeline stage, wrapped or not.
        read: returns a full HF tensor by name; only called for tensors that this rank holds a part of.
    """
    for entry, parameters in bind(chunks, table).items():
        rank, size = tensor_parallel_place(entry)
        shard = entry.rule.layout.shard([read(tensor.name) for tensor in entry.hf], rank, size)
        for parameter in parameters:
            assert parameter.shape == shard.shape, (entry.rule.megatron, parameter.shape, shard.shape)
            parameter.copy_(shard)


def tensor_parallel_place(entry: TableEntry) -> tuple[int, int]:
    """(rank, size) of this process in the group that splits the entry's parameter."""
    if entry.rule.per_expert:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
