"""The terms of a two-way table HF <-> Megatron, and how it is bound to the parameters of a sharded model.

One table serves everything that moves weights: loading, random initialisation, the engine sync, the export, and the
conversion to and from Megatron's distributed checkpoints.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron.core import parallel_state
from torch import nn

from megatron_dsrl.weights.layouts import Layout, Shape

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(\.local_experts\.|\.experts\.linear_fc[12]\.weight)(\d+)")


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the HF checkpoint."""

    name: str
    """With `{layer}` and `{expert}` in place of their numbers where there is one per layer or expert."""
    shape: Shape


@dataclass(frozen=True)
class TensorRule:
    """One Megatron parameter (per layer, per expert) and the HF tensors that it is made of."""

    hf: tuple[HfTensor, ...]
    megatron: tuple[str, ...]
    """Names of the parameter, `{layer}` and `{expert}` included: local and Transformer Engine's, or several holders of
    one tensor."""
    layout: Layout
    initial: Literal["normal", "ones", "zeros"] = "normal"
    """What a freshly made model holds."""
    stored_as: str = ""
    """Its name in distributed checkpoints, where it differs from `megatron[0]`."""

    @property
    def per_layer(self) -> bool:
        """There is one of it in every layer."""
        return "{layer}" in self.megatron[0]

    @property
    def per_expert(self) -> bool:
        """There is one of it for every expert of a layer."""
        return "{expert}" in self.megatron[0]

    @property
    def checkpoint_name(self) -> str:
        """Name in distributed checkpoints, where all layers and all experts are one tensor, stacked."""
        return (self.stored_as or self.megatron[0]).replace("{layer}.", "")


@dataclass(frozen=True)
class WeightTable:
    """All rules of a model, in the order in which the model uses them."""

    rules: tuple[TensorRule, ...]
    num_layers: int
    num_experts: int = 0
    """In every layer; 0 for a dense model."""
    copies: Mapping[str, str] = field(default_factory=dict, hash=False)
    """HF names that a checkpoint may hold in addition, and the names of the tensors that they must equal."""

    def entries(self) -> Iterator["TableEntry"]:
        """Every rule, layer and expert once: rules before the layers, layer by layer, rules after them."""
        first, last = self._per_layer_span()
        yield from (TableEntry(rule) for rule in self.rules[:first])
        for layer in range(self.num_layers):
            for rule in self.rules[first:last]:
                if rule.per_expert:
                    yield from (TableEntry(rule, layer, expert) for expert in range(self.num_experts))
                else:
                    yield TableEntry(rule, layer)
        yield from (TableEntry(rule) for rule in self.rules[last:])

    def hf_shapes(self) -> dict[str, Shape]:
        """Shape of every HF tensor by name."""
        return {tensor.name: tensor.shape for entry in self.entries() for tensor in entry.hf}

    def _per_layer_span(self) -> tuple[int, int]:
        per_layer = [i for i, rule in enumerate(self.rules) if rule.per_layer]
        assert per_layer == list(range(per_layer[0], per_layer[-1] + 1)), "rules of the layers must stand together"
        return per_layer[0], per_layer[-1] + 1


@dataclass(frozen=True)
class TableEntry:
    """A rule at one layer and expert, or a rule outside of the layers."""

    rule: TensorRule
    layer: int | None = None
    """Counted over the whole model, from 0."""
    expert: int | None = None
    """Counted over the whole layer, from 0."""

    @property
    def hf(self) -> tuple[HfTensor, ...]:
        """The HF tensors with the numbers filled in."""
        return tuple(
            HfTensor(tensor.name.format(layer=self.layer, expert=self.expert), tensor.shape) for tensor in self.rule.hf
        )


def bind(chunks: Sequence[nn.Module], table: WeightTable) -> dict[TableEntry, list[nn.Parameter]]:
    """Find the parameters of this rank's model chunks in the table.

    Args:
        chunks: GPTModel chunks, in whatever wrappers.

    Returns:
        Parameters by entry: one each, but for a tied embedding that first and last stage share and both hold.
    """
    rule_of_name = {name: rule for rule in table.rules for name in rule.megatron}
    first_expert = table.num_experts // parallel_state.get_expert_model_parallel_world_size()
    first_expert *= parallel_state.get_expert_model_parallel_rank()
    bound: dict[TableEntry, list[nn.Parameter]] = {}
    for chunk in chunks:
        model = unwrap(chunk)
        for name, parameter in model.named_parameters():
            in_layer, of_expert = _LAYER.match(name), _EXPERT.search(name)
            layer = model.decoder.layers[int(in_layer[1])].layer_number - 1 if in_layer else None
            expert = first_expert + int(of_expert[2]) if of_expert else None
            pattern = _EXPERT.sub(r"\1{expert}", _LAYER.sub("decoder.layers.{layer}.", name))
            assert pattern in rule_of_name, f"the weight table does not know the Megatron parameter {name}"
            bound.setdefault(TableEntry(rule_of_name[pattern], layer, expert), []).append(parameter)
    return bound


def unwrap(chunk: nn.Module) -> nn.Module:
    """The GPTModel inside the wrappers for low precision and data parallelism."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
