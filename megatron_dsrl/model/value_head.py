"""A value model: the decoder with a scalar output per token instead of logits."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.model.build import bare_model, build_model
from megatron_dsrl.platform import current_platform


class ValueHead(MegatronModule):
    """Linear layer hidden -> 1 with a bias, computed in fp32 for any parameter dtype.

    Every tensor-parallel rank holds it in full and gets the same hidden states, so its gradient is the same on all
    ranks without a reduction.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """[..., hidden] -> [..., 1] float32, and None as the bias still to be added (Megatron's convention)."""
        return F.linear(hidden.float(), self.weight.float(), self.bias.float()), None


def build_value_model(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> list[MegatronModule]:
    """As `build_model`, with a `ValueHead` as output layer of the last stage.

    The embedding is never tied: the value head has no vocabulary to share with it.
    """
    chunks = build_model(replace(architecture, tie_word_embeddings=False), model, parallel)
    for chunk in chunks:
        bare = bare_model(chunk)
        if bare.post_process:
            bare.output_layer = ValueHead(bare.config).to(current_platform().device)
    return chunks
