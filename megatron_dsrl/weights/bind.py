"""Match the parameters of a sharded model with a weight table."""

import re
from collections.abc import Sequence

from megatron.core import parallel_state
from torch import nn

from megatron_dsrl.model.build import bare_model
from megatron_dsrl.model.lora import is_adapter
from megatron_dsrl.weights.table import TableEntry, WeightTable

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(\.local_experts\.|\.experts\.linear_fc[12]\.weight)(\d+)")


def bind(chunks: Sequence[nn.Module], table: WeightTable) -> dict[TableEntry, list[nn.Parameter]]:
    """The parameters of this rank's model chunks, wrapped or not, by their entries in the table. There is one per
    entry, except for a tied embedding if this rank holds it twice."""
    rules = {name: rule for rule in table.rules for name in rule.megatron}
    first_expert = table.num_experts // parallel_state.get_expert_model_parallel_world_size()
    first_expert *= parallel_state.get_expert_model_parallel_rank()
    bound: dict[TableEntry, list[nn.Parameter]] = {}
    for chunk in chunks:
        model = bare_model(chunk)
        for name, parameter in model.named_parameters():
            if is_adapter(name) != table.holds_adapters:
                continue
            in_layer, in_expert = _LAYER.match(name), _EXPERT.search(name)
            layer = model.decoder.layers[int(in_layer[1])].layer_number - 1 if in_layer else None
            expert = first_expert + int(in_expert[2]) if in_expert else None
            pattern = _EXPERT.sub(r"\1{expert}", _LAYER.sub("decoder.layers.{layer}.", name))
            assert pattern in rules, f"the weight table has no rule for the Megatron parameter {name}"
            bound.setdefault(TableEntry(rules[pattern], layer, expert), []).append(parameter)
    return bound
