"""Compare the logits of Transformers and of Megatron on fixed prompts, in float32."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import Tensor

from megatron_dsrl.common.collective import on_first, world_size
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.model.build import build_model
from megatron_dsrl.model.parallel import destroy_model_parallel, initialize_parallel
from megatron_dsrl.platform import current_platform
from megatron_dsrl.platform.engine_process import prepare_engine_process
from megatron_dsrl.weights.load import load_weights
from megatron_dsrl.weights.table import WeightTable, weight_table

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Let x be a real number such that x^2 - 5x + 6 = 0. The sum of all such x is",
    "def fibonacci(n):\n    return n if n < 2 else",
)
TOLERANCE = 1e-4
"""Relative to the largest logit. Float32 rounding from different summation orders stays below it even in deep
models."""
MEMORY_MARGIN = 1.25


def compare_logits(hf_folder: Path, megatron_folder: Path, architecture: Architecture, console: Console) -> None:
    """Compare and print the result, or why the comparison was skipped. Raises UserError if the logits differ by more
    than `TOLERANCE`.

    Collective: every process holds the Megatron model, rank 0 the Transformers model as well.
    """
    table = weight_table(architecture)
    parameters = sum(torch.Size(shape).numel() for shape in table.hf_shapes().values())
    needed = MEMORY_MARGIN * parameters * torch.float32.itemsize * (world_size() + 1)
    available = on_first(lambda: psutil.virtual_memory().available)
    if needed > available:
        console.print(
            f"logits not compared: both models in float32 need {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
        )
        return
    rows = on_first(lambda: _prompt_rows(hf_folder, architecture.vocab_size))
    found = _megatron_logits(megatron_folder, architecture, table, rows)
    console.print("verified " + on_first(lambda: _compare(_transformers_logits(hf_folder, rows), found)))


def _compare(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    largest = max(x.abs().max().item() for x in expected)
    difference = max((x - y).abs().max().item() for x, y in zip(expected, found, strict=True))
    tokens = sum(x.shape[0] for x in expected)
    what = f"logits of {len(expected)} prompts, {tokens} tokens: largest difference {difference:.1e}, "
    what += f"largest logit {largest:.1f}"
    if not difference <= TOLERANCE * largest:
        raise UserError(f"verification failed: {what}, allowed {TOLERANCE * largest:.1e}")
    return what


def _prompt_rows(folder: Path, vocab_size: int) -> list[list[int]]:
    """Token ids of the prompts; random but fixed ids for a folder without a tokenizer."""
    if not (folder / "tokenizer.json").exists():
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, vocab_size, (24,), generator=generator).tolist() for _ in PROMPTS]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]
    return [row for row in rows if row] or [list(range(min(24, vocab_size)))]


@torch.no_grad()
def _megatron_logits(
    folder: Path, architecture: Architecture, table: WeightTable, rows: Sequence[Sequence[int]]
) -> list[Tensor]:
    """[tokens, vocabulary] per row, on CPU."""
    parallel = ParallelConfig()
    initialize_parallel(parallel, seed=0)
    try:
        chunks = build_model(architecture, ModelConfig(path=str(folder), dtype="float32"), parallel)
        load_weights(chunks, table, folder)
        model, device = chunks[0].eval(), current_platform().device
        logits = [model(torch.tensor([row], device=device), None, None)[0] for row in rows]
        return [x[:, : architecture.vocab_size].float().cpu() for x in logits]
    finally:
        destroy_model_parallel()


@torch.no_grad()
def _transformers_logits(folder: Path, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """[tokens, vocabulary] per row, on CPU."""
    prepare_engine_process()  # Transformers' models import torchvision, which fails without CUDA
    from transformers import AutoModelForCausalLM

    device = current_platform().device
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    return [model(torch.tensor([row], device=device)).logits[0].float().cpu() for row in rows]
