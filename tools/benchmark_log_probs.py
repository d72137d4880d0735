#!/usr/bin/env python3
"""Log-probs and entropy over a large vocabulary: memory and time of the actor's and the naive implementation.

The naive implementation applies the output layer to all tokens, takes `log_softmax` of the float32 logits, and picks
out the values it needs. The actor applies the output layer only to tokens that predict a response token, in blocks of
the vocabulary, and keeps the logits for the backward pass up to a limit (`actor.kept_logits_megabytes`). Each
implementation runs in its own process, forward and backward to the hidden states and the output layer's weight; the
script checks that the values agree up to rounding. Peak memory excludes the inputs; seconds are process time on CPU and
wall-clock time on a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_dsrl.actor.log_probs import LogProbOptions, VocabularyShard, log_probs_and_entropy
from megatron_dsrl.model.output_rows import FactoredLogits
from megatron_dsrl.platform import current_platform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Batch:
    """Inputs shared by all implementations."""

    hidden: Tensor
    """[tokens, hidden size]."""
    weight: Tensor
    """[vocabulary, hidden size]."""
    rows: Tensor
    """[responses] int64, the tokens that predict a response token."""
    targets: Tensor
    """[responses] int64."""

    def scaled(self) -> Tensor:
        """Hidden states whose logits are of the order of 1."""
        return self.hidden * self.hidden.shape[1] ** -0.5


def naive(logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy by `log_softmax` of all rows; the entropy has no gradient."""
    distribution = torch.log_softmax(logits.float(), dim=-1)
    with torch.no_grad():
        entropy = -(distribution.exp() * distribution).sum(-1)
    return distribution[rows, targets], entropy[rows]


def naive_on_all_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits of all tokens, then `naive`: what a plain training loop does."""
    return naive(batch.scaled() @ batch.weight.T, batch.rows, batch.targets)


def naive_on_responses(batch: Batch) -> tuple[Tensor, Tensor]:
    """`naive` on the logits of the scored tokens only."""
    everything = torch.arange(len(batch.rows), device=batch.rows.device)
    return naive(batch.scaled()[batch.rows] @ batch.weight.T, everything, batch.targets)


def in_blocks(batch: Batch, kept_bytes: int, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
    """The actor's own function, which keeps at most `kept_bytes` of logits for the backward pass."""
    shard = VocabularyShard(first=0, num_valid=len(batch.weight), group=None)
    options = LogProbOptions(shard, entropy_gradient=entropy_gradient, kept_bytes=kept_bytes)
    logits = FactoredLogits(batch.scaled()[batch.rows], batch.weight, fused_gradient=False)
    return log_probs_and_entropy(logits, batch.targets, options)


WAYS: dict[str, Callable[[Batch], tuple[Tensor, Tensor]]] = {
    "naive, all tokens": naive_on_all_tokens,
    "naive, response tokens": naive_on_responses,
    "the actor, all logits kept": partial(in_blocks, kept_bytes=2**40),
    "the actor, none kept": partial(in_blocks, kept_bytes=0),
    "the actor, none kept, with the entropy's gradient": partial(in_blocks, kept_bytes=0, entropy_gradient=True),
}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fastest repetition in seconds, peak bytes without the inputs, and values for the comparison."""
    platform = current_platform()
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(platform.device, DTYPES[options.dtype]).requires_grad_()

    responses = int(options.tokens * options.response_share)
    batch = Batch(
        hidden=leaf(options.tokens, options.hidden_size),
        weight=leaf(options.vocabulary, options.hidden_size),
        rows=torch.arange(options.tokens - responses, options.tokens, device=platform.device),
        targets=torch.randint(options.vocabulary, (responses,), generator=generator).to(platform.device),
    )
    # On a shared CPU, process time excludes the time that other programs take.
    clock = time.perf_counter if platform.name == "cuda" else time.process_time
    seconds, before = [], platform.memory_statistics()
    for _ in range(options.repetitions):
        batch.hidden.grad = batch.weight.grad = None
        started = clock()
        log_probs, entropy = WAYS[name](batch)
        (log_probs.sum() + (entropy.sum() if entropy.requires_grad else 0)).backward()
        if platform.name == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return {
        "seconds": min(seconds),
        "bytes": platform.memory_statistics().peak_bytes - before.allocated_bytes,
        "log_prob": log_probs.mean().item(),
        "entropy": entropy.mean().item(),
    }


def main() -> None:
    """Command line: measures every way in a separate process and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per packed row")
    parser.add_argument("--response-share", type=float, default=0.5, help="share of the tokens that are scored")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    results = {}
    for name in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", name]
        results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print_table(results, options)


def print_table(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Print a table; ratios are relative to the first row."""
    first = next(iter(results.values()))
    table = Table("", "peak GB", "ratio", "seconds", "ratio", box=None)
    for name, result in results.items():
        for number in ("log_prob", "entropy"):
            assert abs(result[number] - first[number]) <= 0.01 * abs(first[number]), f"{name}: another {number}"
        table.add_row(
            name,
            f"{result['bytes'] / 1e9:.2f}",
            f"{result['bytes'] / first['bytes']:.2f}",
            f"{result['seconds']:.2f}",
            f"{result['seconds'] / first['seconds']:.2f}",
        )
    console = Console()
    console.print(
        f"{options.tokens} tokens, {options.response_share:.0%} of them scored; vocabulary {options.vocabulary}, "
        f"hidden size {options.hidden_size}, {options.dtype}; {torch.get_num_threads()} thread(s), "
        f"device {current_platform().name}"
    )
    console.print(table)


if __name__ == "__main__":
    main()
