"""Random numbers of sampling: every sample has its own seed.

A seed is a pure function of what the sample is for. A run that continues after an interruption therefore draws the same
samples as without it, regardless of which engine gets which request in which order. SGLang derives the random number of
a token from the sample's seed and the token's position.

Streams: `step 12` for the rollout batch of step 12, `evaluation <set>` for a held-out set, `benchmark <name>` in `dsrl
eval`. Evaluations of one set share their random numbers, so that their differences reflect the policies more than
chance.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

from megatron_dsrl.data.prompt import Prompt


def sample_seed(run_seed: int, stream: str, prompt: int, sample: int) -> int:
    """Seed of one sample, in 0..2^63 - 1: the first 63 bits of BLAKE2b over `<run seed>/<stream>/<prompt>/<sample>`.

    `prompt` is the prompt's index in its set; `sample` counts the samples of this prompt from 0.
    """
    key = f"{run_seed}/{stream}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def seeds_of_batch(
    run_seed: int, stream: str, prompts: Sequence[Prompt], samples_per_prompt: int, seen: Counter[int] | None = None
) -> list[tuple[int, ...]]:
    """Seeds of every prompt's samples. If a prompt occurs again, its sample numbers continue.

    `seen` says how often each prompt (by index) has occurred in the stream so far, for streams whose prompts come in
    several calls; updated in place.
    """
    seen = Counter() if seen is None else seen
    seeds = []
    for prompt in prompts:
        first = seen[prompt.index] * samples_per_prompt
        seen[prompt.index] += 1
        numbers = range(first, first + samples_per_prompt)
        seeds.append(tuple(sample_seed(run_seed, stream, prompt.index, number) for number in numbers))
    return seeds


def turn_seed(seed: int, turn: int) -> int:
    """Seed of a turn in a response with several (`rollout.generate`), in 0..2^63 - 1. The first has the sample's seed.
    Turns count from 0."""
    if turn == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=8).digest(), "big") >> 1


def stream_of_round(step: int, number: int) -> str:
    """Stream name of a step's batch; `number` counts the step's batches from 0."""
    return f"step {step} round {number}" if number else f"step {step}"
