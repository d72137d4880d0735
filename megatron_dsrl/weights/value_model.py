"""Load a value model from a policy or from a previously trained critic."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.weights.checkpoint_record import check_record
from megatron_dsrl.weights.checkpoint_shapes import check_hf_checkpoint, check_megatron_checkpoint
from megatron_dsrl.weights.hf_checkpoint import HfCheckpoint
from megatron_dsrl.weights.load import fill
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint, is_megatron_checkpoint
from megatron_dsrl.weights.table import TableEntry, WeightTable
from megatron_dsrl.weights.tables import value_model_table, weight_table


def load_value_model(chunks: Sequence[nn.Module], architecture: Architecture, folder: Path) -> None:
    """Fill this rank's parameters. From a policy only the decoder is loaded; the head is zero, and so are all values.

    Args:
        chunks: chunks of a value model, wrapped or not.
        architecture: architecture of policy and critic.
        folder: HF folder of a policy or of a token classifier with one label, or a policy converted to a Megatron
            distributed checkpoint.

    Raises:
        UserError: weights are missing or damaged, or a tensor is missing, unexpected or of the wrong shape.
    """
    policy, value_model = weight_table(architecture), value_model_table(architecture)
    read_stored: Callable[[str], Tensor]
    if is_megatron_checkpoint(folder):
        check_record(folder, architecture)
        megatron = MegatronCheckpoint(folder)
        check_megatron_checkpoint(megatron, policy)
        stored, read_stored = set(policy.hf_shapes()), _ByHfName(megatron, value_model).read
    else:
        checkpoint = HfCheckpoint(folder)
        stored, read_stored = checkpoint.names(), checkpoint.read
        is_value_model = any(name.startswith("score.") for name in stored)
        check_hf_checkpoint(checkpoint, value_model if is_value_model else policy)
    shapes = value_model.hf_shapes()
    fill(chunks, value_model, lambda name: read_stored(name) if name in stored else torch.zeros(shapes[name]))


class _ByHfName:
    """Reads a Megatron checkpoint by HF name. Caches the last entry, since its tensors are requested consecutively."""

    def __init__(self, checkpoint: MegatronCheckpoint, table: WeightTable) -> None:
        self._checkpoint = checkpoint
        self._entries = {tensor.name: entry for entry in table.entries() for tensor in entry.hf}
        self._last: tuple[TableEntry, tuple[Tensor, ...]] | None = None

    def read(self, name: str) -> Tensor:
        """A whole tensor in the checkpoint's dtype, in the shape of its HF name."""
        entry = self._entries[name]
        if self._last is None or self._last[0] != entry:
            self._last = entry, self._checkpoint.read(entry)
        return self._last[1][[tensor.name for tensor in entry.hf].index(name)]
