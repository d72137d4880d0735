#!/usr/bin/env python3
"""Cost of a rollout batch outside engines and models, per response token.

Rank 0 parses the engines' answers and pickles the batch; gloo sends it to every rank, where it is unpickled and turned
into an `Experience`.

Rank 0's time grows with the batch, however many GPUs share it. The results are constants in
megatron_dsrl/planning/scale.py, which predicts where this becomes the bottleneck.
"""

import argparse
import json
import pickle
import random
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table

from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.rollout.engines.generation import read_completion

VOCABULARY = 151_936
PROMPT_TOKENS = 200


def random_answers(samples: int, tokens: int) -> list[str]:
    """SGLang's answers to `/generate` with log-probs, as JSON texts."""
    chance = random.Random(0)

    def answer() -> str:
        ids = [chance.randrange(VOCABULARY) for _ in range(tokens)]
        meta = {
            "finish_reason": {"type": "length", "length": tokens},
            "output_token_logprobs": [(-chance.expovariate(3), token, None) for token in ids],
            "weight_versions": [{"version": "1", "start": 0, "end": tokens}],
        }
        return json.dumps({"text": "so x = 2, " * (tokens // 3), "output_ids": ids, "meta_info": meta})

    return [answer() for _ in range(samples)]


def read_answers(answers: list[str]) -> list[Response]:
    """Parse answers like the rollout client, into the form that is shared with the other ranks."""
    completions = [read_completion(json.loads(answer)) for answer in answers]
    prompt = tuple(range(PROMPT_TOKENS))
    return [Response(prompt, done.response_ids, done.log_probs, 1.0, group) for group, done in enumerate(completions)]


def best_of(repetitions: int, work: Callable[[], object]) -> float:
    """Duration of the fastest repetition in seconds; other programs can only make it longer."""
    return min(_seconds(work) for _ in range(repetitions))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def broadcast_repeatedly(rank: int, file: str, size: int, repetitions: int, result: str) -> None:
    """Send bytes from process 0 to process 1; process 0 writes the fastest time in seconds."""
    store = dist.FileStore(file, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    payload = torch.zeros(size, dtype=torch.uint8)
    dist.broadcast(payload, src=0)  # the first one opens the connections

    def send() -> None:
        dist.broadcast(payload, src=0)
        dist.barrier()

    seconds = best_of(repetitions, send)
    if rank == 0:
        Path(result).write_text(repr(seconds))
    dist.destroy_process_group()


def transport_seconds(size: int, repetitions: int) -> float:
    """Time to send bytes between two processes on this machine over gloo."""
    with TemporaryDirectory(prefix="controller-benchmark-") as folder:
        file, result = f"{folder}/store", f"{folder}/seconds"
        torch.multiprocessing.spawn(broadcast_repeatedly, args=(file, size, repetitions, result), nprocs=2)
        return float(Path(result).read_text())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=256, help="samples per batch (default: 256)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per response (default: 4096)")
    parser.add_argument("--repetitions", type=int, default=3, help="repetitions; the fastest counts (default: 3)")
    options = parser.parse_args()
    answers = random_answers(options.samples, options.tokens)
    responses = read_answers(answers)
    pickled = pickle.dumps(responses)
    times = {
        "rank 0: answers read, while others are generated": lambda: read_answers(answers),
        "rank 0: pickled": lambda: pickle.dumps(responses),
        "every rank: unpickled, made an experience": lambda: build_experience(
            pickle.loads(pickled), PostTrain(name="post_train"), ()
        ),
    }
    tokens = options.samples * options.tokens
    table = Table("", "seconds", "ns per token", box=None)
    for name, work in times.items():
        seconds = best_of(options.repetitions, work)
        table.add_row(name, f"{seconds:.3f}", f"{seconds / tokens * 1e9:.0f}")
    seconds = transport_seconds(len(pickled), options.repetitions)
    table.add_row("sent to another process", f"{seconds:.3f}", f"{seconds / tokens * 1e9:.0f}")
    console = Console(width=110)
    console.print(f"{options.samples} responses of {options.tokens:,} tokens")
    console.print(table)
    console.print(
        f"{len(pickled) / tokens:.1f} bytes per token; {len(pickled) / seconds / 1e9:.2f} GB/s between two processes"
    )


if __name__ == "__main__":
    main()
