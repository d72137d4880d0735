"""Fill a sharded model: from an HF checkpoint, from a Megatron distributed checkpoint of any layout, or randomly."""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from megatron_dsrl.common.collective import rank, together, world_size
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.model.build import bare_model
from megatron_dsrl.model.lora import is_adapter
from megatron_dsrl.weights.checkpoint_record import check_record
from megatron_dsrl.weights.checkpoint_shapes import check_hf_checkpoint, check_megatron_checkpoint, open_hf_weights
from megatron_dsrl.weights.hf_checkpoint import HfCheckpoint
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint, is_megatron_checkpoint
from megatron_dsrl.weights.table import TableEntry, WeightTable, value_model_table, weight_table
from megatron_dsrl.weights.untrusted_checkpoint import only_plain_objects

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(\.local_experts\.|\.experts\.linear_fc[12]\.weight)(\d+)")


def load_weights(chunks: Sequence[nn.Module], table: WeightTable, folder: Path) -> None:
    """Fill this rank's parameters from an HF folder or a Megatron distributed checkpoint. Collective. Raises UserError
    if the weights are missing or damaged, config.json differs from the recorded one, a tensor is missing, unexpected or
    of the wrong shape, or a tied head differs from the embedding."""
    if is_megatron_checkpoint(folder):
        _load_megatron_weights(chunks, table, folder)
    else:
        load_hf_weights(chunks, table, folder)


def _load_megatron_weights(chunks: Sequence[nn.Module], table: WeightTable, folder: Path) -> None:
    """Use Megatron's own loading, which reshards to the current layout. Collective."""
    if (folder / "config.json").exists():  # a run's checkpoint has neither that nor a record
        check_record(folder, read_architecture(folder))
    checkpoint = MegatronCheckpoint(folder)
    check_megatron_checkpoint(checkpoint, table)
    together(lambda: checkpoint.check_chunks(rank(), world_size()))
    models = [bare_model(chunk) for chunk in chunks]
    wanted = {f"model{i}": _sharded_parameters(model) for i, model in enumerate(models)}
    with only_plain_objects(folder):
        loaded = dist_checkpointing.load(wanted, str(folder))
    for i, model in enumerate(models):
        result = model.load_state_dict(loaded[f"model{i}"], strict=False)
        missing = [name for name in result.missing_keys if not is_extra_state(name) and not is_adapter(name)]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


def _sharded_parameters(model: GPTModel) -> dict[str, Any]:
    """The model's sharded state without LoRA adapters, which are not in a model's files, and without the layers' extra
    state, which is empty except in low-precision formats."""
    metadata = {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = model.sharded_state_dict(metadata=metadata)
    return {name: value for name, value in state.items() if not is_extra_state(name) and not is_adapter(name)}


def is_extra_state(name: str) -> bool:
    """Whether an entry of a model's state is a layer's extra state: `..._extra_state`, in Transformer Engine's experts
    also with a number after it."""
    return "_extra_state" in name


def load_hf_weights(chunks: Sequence[nn.Module], table: WeightTable, folder: Path) -> None:
    """Fill this rank's parameters from the safetensors of an HF folder, reading only the tensors it needs.

    Call it before building the optimizer, which copies the parameters into its fp32 master weights. Values are cast to
    the parameters' dtype. Raises UserError like `load_weights`.
    """
    fill(chunks, table, open_hf_weights(folder, table).read)


@torch.no_grad()
def fill(chunks: Sequence[nn.Module], table: WeightTable, read: Callable[[str], Tensor]) -> None:
    """Fill this rank's parameters from full HF tensors. `read` returns one by name; it is only called for tensors that
    this rank holds a part of."""
    for entry, parameters in bind(chunks, table).items():
        whole = [read(tensor.name) for tensor in entry.hf]
        shard = entry.rule.layout.shard(whole, *tensor_parallel_place(entry))
        for parameter in parameters:
            assert parameter.shape == shard.shape, (entry.rule.megatron, parameter.shape, shard.shape)
            parameter.copy_(shard)


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


def tensor_parallel_place(entry: TableEntry) -> tuple[int, int]:
    """(rank, size) of this process in the group that splits the entry's parameter."""
    if entry.rule.per_expert:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def fill_with_random_weights(
    chunks: Sequence[nn.Module], table: WeightTable, standard_deviation: float, seed: int
) -> None:
    """Initialise the model as Transformers does: norms one, biases zero, all other weights normal with mean zero and
    this standard deviation (`initializer_range` in HF configurations). Adapters are initialised as in PEFT: B zero, A
    uniform within 1 / sqrt(inputs).

    Each HF tensor has its own generator, seeded by its name, and is drawn in full before it is sharded, so every layout
    gets the same model.
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


def load_value_model(chunks: Sequence[nn.Module], architecture: Architecture, folder: Path) -> None:
    """Fill this rank's parameters. From a policy only the decoder is loaded; the head is zero, and so are all values.
    Raises UserError if weights are missing or damaged, or a tensor is missing, unexpected or of the wrong shape.

    Args:
        architecture: that of the folder.
        folder: HF folder of a policy or of a classifier of tokens or sequences with one label, or a policy converted to
            a Megatron distributed checkpoint. A head without a bias gets one of zero.
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
        expected = value_model if any(name.startswith("score.") for name in stored) else policy
        if "score.bias" not in stored:  # classifiers of sequences have none
            rules = tuple(rule for rule in expected.rules if rule.hf[0].name != "score.bias")
            expected = replace(expected, rules=rules)
        check_hf_checkpoint(checkpoint, expected)
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
