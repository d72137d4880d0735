"""Names and shapes of the tensors that a distributed checkpoint of a model has."""

from pathlib import Path

import torch

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.weights.layouts import Shape, Vocabulary
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_dsrl.weights.table import TensorRule, WeightTable

LARGEST_PADDING = 1024
"""Limit on padding rows of a vocabulary; Megatron-LM pads to a multiple of 128 x tensor-parallel size."""


def checkpoint_shape(rule: TensorRule, table: WeightTable) -> Shape:
    """Shape of a rule's tensor in a checkpoint, without vocabulary padding."""
    stacked = ((table.num_layers,) if rule.per_layer else ()) + ((table.num_experts,) if rule.per_expert else ())
    return stacked + whole_shape(rule)


def whole_shape(rule: TensorRule) -> Shape:
    """Shape of one unsharded Megatron parameter."""
    with torch.device("meta"):
        return tuple(rule.layout.shard([torch.empty(tensor.shape) for tensor in rule.hf], 0, 1).shape)


def check_megatron_checkpoint(checkpoint: MegatronCheckpoint, table: WeightTable) -> None:
    """Compare names and shapes with the table. A padded vocabulary is accepted.

    Raises:
        UserError: names the first few differences.
    """
    shapes = checkpoint.shapes()
    expected = {rule.checkpoint_name: checkpoint_shape(rule, table) for rule in table.rules}
    padded = {rule.checkpoint_name for rule in table.rules if isinstance(rule.layout, Vocabulary)}
    refuse([name for name in expected if name not in shapes], "missing tensors", checkpoint.folder)
    refuse(
        [name for name in shapes if name not in expected and "_extra_state" not in name],
        "tensors that the model of config.json does not have",
        checkpoint.folder,
    )
    wrong = [
        f"{name} is {list(shapes[name])}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if not _fits(shapes[name], shape, name in padded)
    ]
    refuse(wrong, "tensors of the wrong shape", checkpoint.folder)


def _fits(shape: Shape, expected: Shape, may_be_padded: bool) -> bool:
    if not may_be_padded:
        return shape == expected
    return shape[1:] == expected[1:] and expected[0] <= shape[0] < expected[0] + LARGEST_PADDING


def refuse(problems: list[str], kind: str, folder: Path) -> None:
    """Raise UserError for any problems; the message names the first few."""
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise UserError(f"{folder}: {kind}: {shown}")
