"""Load an HF checkpoint into a sharded model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_dsrl.errors import UserError
from megatron_dsrl.weights.hf_checkpoint import HfCheckpoint
from megatron_dsrl.weights.table import TableEntry, WeightTable, bind


def load_hf_weights(chunks: Sequence[nn.Module], table: WeightTable, folder: Path) -> None:
    """Fill this rank's parameters from the safetensors of an HF folder, reading only the tensors that they are made of.

    Call it before the optimizer is built, which copies the parameters into its fp32 master weights. Values are cast
    to the parameters' dtype.

    Raises:
        UserError: weights are missing or damaged, a tensor is missing, surplus or of another shape.
    """
    checkpoint = HfCheckpoint(folder)
    check_checkpoint(checkpoint, table)
    fill(chunks, table, checkpoint.read)


def check_checkpoint(checkpoint: HfCheckpoint, table: WeightTable) -> None:
    """Compare names and shapes with the table.

    Raises:
        UserError: names the first few differences.
    """
    expected, names = table.hf_shapes(), checkpoint.names()
    _refuse([name for name in expected if name not in names], "missing tensors", checkpoint.folder)
    surplus = [name for name in sorted(names) if name not in expected and name not in table.ignored]
    _refuse(
        [f"{name} (in {checkpoint.file_of(name).name})" for name in surplus],
        "tensors that the model of config.json does not have",
        checkpoint.folder,
    )
    shapes = checkpoint.shapes()
    wrong = [
        f"{name} (in {checkpoint.file_of(name).name}) is {list(shapes[name])}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    _refuse(wrong, "tensors of the wrong shape", checkpoint.folder)


@torch.no_grad()
def fill(chunks: Sequence[nn.Module], table: WeightTable, read: Callable[[str], Tensor]) -> None:
    """Fill this rank's parameters from full HF tensors.

    Args:
        chunks: GPTModel chunks of this pipeline stage, in whatever wrappers.
        table: the model's weight table.
        read: gives a full HF tensor by name; called only for what this rank holds a part of.
    """
    for entry, parameters in bind(chunks, table).items():
        rank, size = tensor_parallel_place(entry)
        shard = entry.rule.layout.shard([read(tensor.name) for tensor in entry.hf], rank, size)
        for parameter in parameters:
            assert parameter.shape == shard.shape, (entry.rule.megatron, parameter.shape, shard.shape)
            parameter.copy_(shard)


def tensor_parallel_place(entry: TableEntry) -> tuple[int, int]:
    """This process's rank among those that split the entry's parameter, and their number."""
    if entry.rule.per_expert:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def _refuse(problems: Sequence[str], kind: str, folder: Path) -> None:
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise UserError(f"{folder}: {kind}: {shown}")
