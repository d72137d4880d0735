"""Random initial weights that do not depend on the layout."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_dsrl.weights.load import fill
from megatron_dsrl.weights.table import WeightTable


def fill_with_random_weights(
    chunks: Sequence[nn.Module], table: WeightTable, standard_deviation: float, seed: int
) -> None:
    """Initialise the model as Transformers does: norms one, biases zero, all other weights normal with mean zero.
    Adapters are initialised as in PEFT: B zero, A uniform within 1 / sqrt(inputs).

    Each HF tensor has its own generator, seeded by its name, and is drawn in full before it is sharded, so every layout
    gets the same model.

    Args:
        chunks: GPTModel chunks of this pipeline stage, wrapped or not.
        standard_deviation: standard deviation of the normal distribution; `initializer_range` in HF configurations.
    """
    expected = {tensor.name: (tensor.shape, entry.rule.initial) for entry in table.entries() for tensor in entry.hf}

    def draw(name: str) -> Tensor:
        shape, initial = expected[name]
        if initial == "ones":
            return torch.ones(shape)
        if initial == "zeros":
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if initial == "uniform":
            return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
        return torch.randn(shape, generator=generator) * standard_deviation

    fill(chunks, table, draw)
