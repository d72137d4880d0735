"""LoRA adapters as PEFT's files: their weight table, and the folder with both files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from megatron_dsrl.common.collective import on_first, rank
from megatron_dsrl.common.disk import writing
from megatron_dsrl.config.actor import LoraConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.model.lora import SUFFIX
from megatron_dsrl.model.projections import Projection, projections
from megatron_dsrl.weights.hf_writer import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from megatron_dsrl.weights.layouts import Replicated, Shape, Split, TensorLayout
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import HF_LAYER, LAYER, HfTensor, Initial, TensorRule, WeightTable


@dataclass(frozen=True)
class PeftAdapters:
    """A policy's adapters, and what their configuration file says."""

    lora: LoraConfig
    table: WeightTable
    base_model: str
    """Folder or hub name of the model that they were trained on."""


def adapter_table(architecture: Architecture, lora: LoraConfig) -> WeightTable:
    """The two-way table between adapters (model/lora.py) and PEFT's tensors."""
    rules = [rule for each in projections(architecture, lora.target_modules) for rule in _rules(each, lora.rank)]
    return WeightTable(tuple(rules), architecture.num_hidden_layers, holds_adapters=True)


def write_peft_folder(
    chunks: Sequence[nn.Module], adapters: PeftAdapters, folder: Path, dtype: torch.dtype, bucket_bytes: int
) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a new folder. Collective. Tensors are gathered in
    buckets of `bucket_bytes`. Raises UserError, on every rank, if it cannot be written."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in chain.from_iterable(stream_hf_weights(chunks, adapters.table, bucket_bytes, dtype)):
        if rank() == 0:
            tensors[name] = tensor.to("cpu", copy=True)

    def write() -> None:
        with writing(folder):
            folder.mkdir()
            content = save(tensors, metadata={"format": "pt"})  # save_file would let only the owner read the file
            (folder / ADAPTER_WEIGHTS).write_bytes(content)
            text = json.dumps(_peft_config(adapters), indent=2, ensure_ascii=False)
            (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")

    on_first(write)


def _rules(projection: Projection, lora_rank: int) -> tuple[TensorRule, TensorRule]:
    """The rules of A and B. Both are initialised as in PEFT."""
    hf = f"base_model.model.{HF_LAYER}{projection.hf_module}.{projection.name}."
    whole, by_inputs, by_outputs = Replicated(), Split(1), Split(0)

    def rule(matrix: str, shape: Shape, layout: TensorLayout, initial: Initial) -> TensorRule:
        megatron = f"{LAYER}{projection.linear}{SUFFIX}.{matrix}.{projection.name}"
        return TensorRule((HfTensor(f"{hf}{matrix}.weight", shape),), (megatron,), layout, initial)

    row = projection.is_row_parallel
    return (
        rule("lora_A", (lora_rank, projection.in_size), by_inputs if row else whole, "uniform"),
        rule("lora_B", (projection.out_size, lora_rank), whole if row else by_outputs, "zeros"),
    )


def _peft_config(adapters: PeftAdapters) -> dict[str, object]:
    """Content of adapter_config.json; PEFT has defaults for the rest."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapters.base_model,
        "r": adapters.lora.rank,
        "lora_alpha": adapters.lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(adapters.lora.target_modules),
        "bias": "none",
        "inference_mode": True,
    }
