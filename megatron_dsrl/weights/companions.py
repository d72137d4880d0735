"""The files that accompany the weights in an HF folder: configuration, tokenizer, chat template, LoRA adapters."""

import json
import shutil
from pathlib import Path

import torch

from megatron_dsrl.common.disk import writing
from megatron_dsrl.weights.hf_checkpoint import torch_dtype_name

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Files copied unchanged. config.json is copied too, with the dtype of the new weights."""
ADAPTER_FOLDER = "adapter"
"""Folder of LoRA adapters within an export. It holds PEFT's two files."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def copy_companions(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy configuration, generation configuration, tokenizer and chat template to a folder with weights of `dtype`.

    Raises:
        UserError: a file cannot be written.
    """
    config = json.loads((source / "config.json").read_text())
    # Transformers wrote `torch_dtype` up to version 4 and writes `dtype` since then; both read the older name.
    for field in {"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}:
        config[field] = torch_dtype_name(dtype)
    with writing(folder / "config.json"):
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for path in {path for pattern in COMPANIONS for path in source.glob(pattern)}:
        if path.is_file():
            copy = folder / path.relative_to(source)
            with writing(copy):
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def is_template_folder(path: Path) -> bool:
    """Whether it is the folder of further chat templates that Transformers writes, with nothing else in it."""
    return path.name == "additional_chat_templates" and all(file.suffix == ".jinja" for file in path.iterdir())
