"""Random initial weights that do not depend on the layout."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_dsrl.weights.load import fill
from megatron_dsrl.weights.table import WeightTable


def fill_with_random_weights(
    chunks: Sequence[nn.Module], table: WeightTable, standard_deviation: float, seed: int
) -> None:
    """Draw the model as Transformers does: norms one, biases zero, all other weights normal around zero.

    Every HF tensor has a generator of its own, seeded by its name, and is drawn in full before it is sharded: any
    tensor- and pipeline-parallel layout holds the same model.

    Args:
        chunks: GPTModel chunks of this pipeline stage, in whatever wrappers.
        table: the model's weight table.
        standard_deviation: of the normal distribution; `initializer_range` of the HF configuration.
        seed: of the whole model.
    """
    expected = {
        tensor.name: (tensor.shape, entry.rule.initial) for entry in table.entries() for tensor in entry.hf
    }

    def draw(name: str) -> Tensor:
        shape, initial = expected[name]
        if initial == "ones":
            return torch.ones(shape)
        if initial == "zeros":
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator) * standard_deviation

    fill(chunks, table, draw)
