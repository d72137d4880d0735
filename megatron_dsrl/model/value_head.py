"""A value model: the decoder with a scalar output per token in the place of the vocabulary's logits."""

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
    """Linear layer hidden -> 1 with a bias, in fp32 whatever the parameters' dtype.

    Every tensor-parallel rank has it whole and gets the same hidden states, so that its gradient is the same on all of
    them without a reduction.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype))

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """[..., hidden] -> [..., 1] float32, and no bias to be added later (Megatron's convention)."""
        return F.linear(hidden.float(), self.weight.float(), self.bias.float()), None


def build_value_model(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> list[MegatronModule]:
    """Build this process's part of a value model; as `build_model`, whose output layer is replaced on the last stage.

    The embedding is tied to nothing: what the policy's head shares with it is of no use to values.
    """
    chunks = build_model(replace(architecture, tie_word_embeddings=False), model, parallel)
    for chunk in chunks:
        bare = bare_model(chunk)
        if bare.post_process:
            bare.output_layer = ValueHead(bare.config).to(current_platform().device)
    return chunks
