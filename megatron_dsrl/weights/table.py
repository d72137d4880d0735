"""A two-way weight table HF <-> Megatron.

The same table is used for loading, random initialisation, weight sync to the engine, export, and conversion to and from
Megatron's distributed checkpoints. LoRA adapters have a table of their own (peft.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_dsrl.weights.layouts import Shape, TensorLayout

Initial = Literal["normal", "uniform", "ones", "zeros"]


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the HF checkpoint."""

    name: str
    """Contains `{layer}` and `{expert}` for tensors that each layer or expert has."""
    shape: Shape


@dataclass(frozen=True)
class TensorRule:
    """One Megatron parameter (per layer, per expert) and the HF tensors it consists of."""

    hf: tuple[HfTensor, ...]
    megatron: tuple[str, ...]
    """Names of the parameter, with `{layer}` and `{expert}`: in local and in Transformer Engine layers, or of several
    parameters that hold the same tensor."""
    layout: TensorLayout
    initial: Initial = "normal"
    """Random initialisation of the parameter; see `random_init.fill_with_random_weights`."""
    stored_as: str = ""
    """Name in distributed checkpoints, if it differs from `megatron[0]`."""

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.megatron[0]

    @property
    def per_expert(self) -> bool:
        """Whether every expert of a layer has one."""
        return "{expert}" in self.megatron[0]

    @property
    def checkpoint_name(self) -> str:
        """Name in distributed checkpoints, where all layers and experts are stacked into one tensor."""
        return (self.stored_as or self.megatron[0]).replace("{layer}.", "")


@dataclass(frozen=True)
class WeightTable:
    """All rules of a model, in the order of the model's computation."""

    rules: tuple[TensorRule, ...]
    num_layers: int
    num_experts: int = 0
    """Experts per layer; 0 for a dense model."""
    copies: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Optional HF names in a checkpoint, mapped to the names of the tensors they must equal."""
    holds_adapters: bool = False
    """Whether the table is that of a model's LoRA adapters, without its other parameters; otherwise it has only the
    others."""

    def entries(self) -> Iterator["TableEntry"]:
        """All entries: rules before the layers, then layer by layer, then rules after the layers."""
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
    """A rule for one layer and expert, or a rule outside the layers."""

    rule: TensorRule
    layer: int | None = None
    """Index in the whole model, from 0."""
    expert: int | None = None
    """Index in the whole layer, from 0."""

    @property
    def hf(self) -> tuple[HfTensor, ...]:
        """The HF tensors with layer and expert filled in."""
        return tuple(
            HfTensor(tensor.name.format(layer=self.layer, expert=self.expert), tensor.shape) for tensor in self.rule.hf
        )
