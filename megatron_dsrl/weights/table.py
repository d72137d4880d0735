"""The terms of a two-way table HF <-> Megatron, and how it is bound to the parameters of a sharded model.

One table serves everything that moves weights: loading, random initialisation, the engine sync and the export.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from megatron_dsrl.weights.layouts import Layout, Shape

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the HF checkpoint."""

    name: str
    """With `{layer}` in place of the layer number where there is one per layer."""
    shape: Shape


@dataclass(frozen=True)
class TensorRule:
    """One Megatron parameter (per layer) and the HF tensors that it is made of."""

    hf: tuple[HfTensor, ...]
    megatron: tuple[str, ...]
    """Names of the parameter, `{layer}` included: local and Transformer Engine's, or several holders of one tensor."""
    layout: Layout
    initial: Literal["normal", "ones"] = "normal"
    """What a freshly made model holds."""

    @property
    def per_layer(self) -> bool:
        """There is one of it in every layer."""
        return "{layer}" in self.megatron[0]


@dataclass(frozen=True)
class WeightTable:
    """All rules of a model, in the order in which the model uses them."""

    rules: tuple[TensorRule, ...]
    num_layers: int
    ignored: tuple[str, ...] = ()
    """HF names that a checkpoint may hold in addition and that are not read."""

    def entries(self) -> Iterator["TableEntry"]:
        """Every rule and layer once: rules before the layers, layer by layer, rules after them."""
        first, last = self._per_layer_span()
        yield from (TableEntry(rule, None) for rule in self.rules[:first])
        for layer in range(self.num_layers):
            yield from (TableEntry(rule, layer) for rule in self.rules[first:last])
        yield from (TableEntry(rule, None) for rule in self.rules[last:])

    def hf_shapes(self) -> dict[str, Shape]:
        """Shape of every HF tensor by name."""
        return {tensor.name: tensor.shape for entry in self.entries() for tensor in entry.hf}

    def _per_layer_span(self) -> tuple[int, int]:
        per_layer = [i for i, rule in enumerate(self.rules) if rule.per_layer]
        assert per_layer == list(range(per_layer[0], per_layer[-1] + 1)), "rules of the layers must stand together"
        return per_layer[0], per_layer[-1] + 1


@dataclass(frozen=True)
class TableEntry:
    """A rule at one layer, or a rule outside of the layers."""

    rule: TensorRule
    layer: int | None
    """Counted over the whole model, from 0."""

    @property
    def hf(self) -> tuple[HfTensor, ...]:
        """The HF tensors with the layer number filled in."""
        return tuple(HfTensor(tensor.name.format(layer=self.layer), tensor.shape) for tensor in self.rule.hf)


def bind(chunks: Sequence[nn.Module], table: WeightTable) -> dict[TableEntry, list[nn.Parameter]]:
    """Find the parameters of this rank's model chunks in the table.

    Args:
        chunks: GPTModel chunks, in whatever wrappers.

    Returns:
        Parameters by entry: one each, but for a tied embedding that first and last stage share and both hold.
    """
    rule_of_name = {name: rule for rule in table.rules for name in rule.megatron}
    bound: dict[TableEntry, list[nn.Parameter]] = {}
    for chunk in chunks:
        model = _unwrap(chunk)
        for name, parameter in model.named_parameters():
            match = _LAYER.match(name)
            layer = model.decoder.layers[int(match[1])].layer_number - 1 if match else None
            pattern = _LAYER.sub("decoder.layers.{layer}.", name)
            assert pattern in rule_of_name, f"the weight table does not know the Megatron parameter {name}"
            bound.setdefault(TableEntry(rule_of_name[pattern], layer), []).append(parameter)
    return bound


def _unwrap(chunk: nn.Module) -> nn.Module:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
