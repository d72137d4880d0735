"""An engine's linear layers with weights in oneDNN's own order, on x86 CPUs.

Decoding multiplies a few rows with every weight. MKL, which PyTorch uses for float32, copies the weights into another
order for each such product. Here that happens once per weight update, which halves the time of these products at the
price of a second copy of the weights.
"""

import logging
import platform
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.utils import cpu_has_amx_support
from torch import Tensor, nn

SMALLEST_PACKED = 100_000
"""Smallest number of weights for which packing pays off: a model of 0.8 million parameters, whose matrices have up to
98,304 weights, decodes as fast either way."""
TYPICAL_ROWS = 32
"""oneDNN chooses the order for this many rows. It suits other numbers as well."""


class PackedProduct:
    """Multiplies with a packed copy of a layer's weight, made for the first product after `forget`."""

    _packed: Tensor | None = None

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., inputs] -> [..., outputs], both in the dtype of the weight."""
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, TYPICAL_ROWS)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")

    def forget(self) -> None:
        """Drop the copy, because the weight changes."""
        self._packed = None


class PackedLinearMethod(PackedProduct, UnquantizedLinearMethod):
    """For SGLang's linear layers."""


class PackedEmbeddingMethod(PackedProduct, UnquantizedEmbeddingMethod):
    """For SGLang's output layer, which is an embedding layer and shares the weights of the embedding if it is tied."""


class PackedModel(nn.Module):
    """Put it before one of SGLang's model classes: its large linear layers use packed weights.

    SGLang calls `load_weights` for a checkpoint and for every weight update, so the copies never outlive their weights.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed_products = list(_pack(self)) if can_pack() else []
        logging.getLogger(__name__).info("%d linear layers have packed weights", len(self._packed_products))

    def load_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Same as in the model class."""
        for product in self._packed_products:
            product.forget()
        return super().load_weights(*args, **kwargs)  # type: ignore[misc]  # of the model class


def can_pack() -> bool:
    """Whether PyTorch has oneDNN's packed products for this CPU, and SGLang does not pack weights itself (for AMX)."""
    return platform.machine() == "x86_64" and torch.backends.mkldnn.is_available() and not cpu_has_amx_support()


def _pack(model: nn.Module) -> Iterator[PackedProduct]:
    """Give each large layer its own packed product in place of its plain one, and return these."""
    dtypes = {torch.float32, torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}
    replacements = {UnquantizedLinearMethod: PackedLinearMethod, UnquantizedEmbeddingMethod: PackedEmbeddingMethod}
    for layer in model.modules():
        if not isinstance(layer, LinearBase | VocabParallelEmbedding):
            continue
        replacement = replacements.get(type(layer.quant_method))
        if replacement and layer.weight.dtype in dtypes and layer.weight.numel() >= SMALLEST_PACKED:
            layer.quant_method = replacement()
            yield layer.quant_method
