#!/usr/bin/env python3
"""Cost of a rollout batch outside engines and models, at 1, 4 and 16 times the paper's batch of 1,024 responses.

Rank 0 receives the engines' answers over HTTP, decodes the responses, has them judged, and pickles the batch; gloo
sends it to every rank, where it is unpickled and turned into an `Experience`. The first three overlap with generation.

Rank 0's time grows with the batch, however many GPUs share it. The results are constants in
megatron_dsrl/planning/scale.py, which predicts where this becomes the bottleneck. Seconds are processor time of rank 0
(all its threads), so that other programs on the machine do not count, except for `sent to another process`.
"""

import argparse
import asyncio
import json
import multiprocessing
import pickle
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing
from aiohttp import web
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_dsrl.algorithms.experience import Experience, Response, build_experience
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.data.tokenizer import decode
from megatron_dsrl.rewards.pool import RewardPool
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest
from megatron_dsrl.rollout.engines.packed_answers import MEDIA_TYPE, pack
from megatron_dsrl.rollout.sample import SamplingParameters

PAPER_PROMPTS, SAMPLES_PER_PROMPT, PAPER_TOKENS = 128, 8, 8192
PROMPT_TOKENS = 200
CALLS_AT_A_TIME = 64
SAMPLING = SamplingParameters(PAPER_TOKENS, stop_token_ids=(0,))

Result = TypeVar("Result")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like Qwen's, trained on this repository's text, with about 4 characters per token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    files = [str(file) for file in Path(__file__).resolve().parent.parent.rglob("*.md")]
    tokenizer.train(files, trainers.BpeTrainer(vocab_size=8000, special_tokens=["<|end|>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def answer_of_a_call(tokens: int, vocabulary: int) -> list[dict[str, Any]]:
    """An engine's answer for one prompt, as SGLang's JSON has it."""
    chance = random.Random(0)

    def answer() -> dict[str, Any]:
        ids = [chance.randrange(1, vocabulary) for _ in range(tokens)]
        log_probs = torch.empty(tokens).exponential_(3).neg().tolist()
        meta = {
            "finish_reason": {"type": "length", "length": tokens},
            "output_token_logprobs": [(log_prob, token, None) for log_prob, token in zip(log_probs, ids)],
            "weight_versions": [{"version": "1", "start": 0, "end": tokens}],
        }
        return {"text": "", "output_ids": ids, "meta_info": meta}

    return [answer() for _ in range(SAMPLES_PER_PROMPT)]


def serve(answers: list[dict[str, Any]], packs: bool, port: Connection) -> None:
    """Answer every `/generate` in the form of our own engines, or in that of other servers."""
    body, kind = (pack(answers), MEDIA_TYPE) if packs else (json.dumps(answers).encode(), "application/json")

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type=kind)

    async def run() -> None:
        application = web.Application(client_max_size=2**30)
        application.router.add_post("/generate", generate)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


@contextmanager
def engine(answers: list[dict[str, Any]], packs: bool) -> Iterator[EngineAddress]:
    """A server process that answers every call at once."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(answers, packs, theirs), daemon=True)
    process.start()
    try:
        yield EngineAddress(f"http://127.0.0.1:{ours.recv()}")
    finally:
        process.kill()
        process.join()


def receive(address: EngineAddress, prompts: int) -> list[Completion]:
    """The samples of a batch, as the rollout receives them: a call per prompt, several at a time."""
    return asyncio.run(call_all(address, prompts))


async def call_all(address: EngineAddress, prompts: int) -> list[Completion]:
    """The answers to a call per prompt."""
    requests = [SampleRequest(tuple(range(PROMPT_TOKENS)), seed, PAPER_TOKENS) for seed in range(SAMPLES_PER_PROMPT)]
    places = asyncio.Semaphore(CALLS_AT_A_TIME)
    async with EngineClient(address, timeout_seconds=600.0) as client:

        async def call() -> list[Completion]:
            async with places:
                return await client.generate(requests, SAMPLING)

        calls = await asyncio.gather(*(call() for _ in range(prompts)))
    return [completion for completions in calls for completion in completions]


def decode_all(tokenizer: PreTrainedTokenizerFast, completions: list[Completion]) -> list[str]:
    """The responses' texts."""
    return [decode(tokenizer, completion.response_ids) for completion in completions]


def judge(texts: list[str]) -> list[float]:
    """Rewards of the responses, in the order of submission."""
    with RewardPool(RewardConfig(function="boxed", workers=1)) as pool:
        return [judgement.result().reward for judgement in [pool.submit(text, "2") for text in texts]]


def pickle_batch(completions: list[Completion]) -> bytes:
    """What rank 0 shares with the other ranks."""
    prompt = tuple(range(PROMPT_TOKENS))
    return pickle.dumps(
        [
            Response(prompt, done.response_ids, done.log_probs, 1.0, number // SAMPLES_PER_PROMPT)
            for number, done in enumerate(completions)
        ]
    )


def unpickle_batch(pickled: bytes) -> Experience:
    """What every rank turns it into."""
    return build_experience(pickle.loads(pickled), PostTrain(name="post_train"))


def timed(work: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """The result of `work(*arguments)`, and the processor time of this process in seconds."""
    begin = time.process_time()
    result = work(*arguments)
    return result, time.process_time() - begin


def broadcast_repeatedly(rank: int, file: str, size: int, repetitions: int, result: str) -> None:
    """Send bytes from process 0 to process 1; process 0 writes the fastest time in seconds."""
    store = dist.FileStore(file, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    payload = torch.zeros(size, dtype=torch.uint8)
    dist.broadcast(payload, src=0)  # the first one opens the connections
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        dist.broadcast(payload, src=0)
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    if rank == 0:
        Path(result).write_text(repr(min(seconds)))
    dist.destroy_process_group()


def transport_seconds(size: int, repetitions: int = 3) -> float:
    """Wall time to send bytes between two processes on this machine over gloo; the fastest of several."""
    with TemporaryDirectory(prefix="controller-benchmark-") as folder:
        file, result = f"{folder}/store", f"{folder}/seconds"
        torch.multiprocessing.spawn(broadcast_repeatedly, args=(file, size, repetitions, result), nprocs=2)
        return float(Path(result).read_text())


def measure(prompts: int, tokens: int, tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, float], int]:
    """Seconds of every part for a batch, and the bytes that are shared."""
    answers, seconds = answer_of_a_call(tokens, len(tokenizer)), {}
    with engine(answers, packs=False) as address:
        _, seconds["rank 0: JSON of other servers received (engine.urls)"] = timed(receive, address, prompts)
    with engine(answers, packs=True) as address:
        completions, seconds["rank 0: answers received"] = timed(receive, address, prompts)
    texts, seconds["rank 0: decoded"] = timed(decode_all, tokenizer, completions)
    _, seconds["rank 0: handed to the verifier and back"] = timed(judge, texts)
    del texts
    pickled, seconds["rank 0: pickled"] = timed(pickle_batch, completions)
    del completions
    _, seconds["every rank: unpickled, made an experience"] = timed(unpickle_batch, pickled)
    seconds["sent to another process"] = transport_seconds(len(pickled))
    return seconds, len(pickled)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="times the paper's 1,024 responses")
    parser.add_argument("--tokens", type=int, default=PAPER_TOKENS, help="tokens per response (default: 8192)")
    options = parser.parse_args()
    tokenizer = make_tokenizer()
    console = Console(width=120)
    for batch in options.batches:
        seconds, size = measure(batch * PAPER_PROMPTS, options.tokens, tokenizer)
        responses = batch * PAPER_PROMPTS * SAMPLES_PER_PROMPT
        table = Table("", "seconds", "ns per token", box=None)
        for part, part_seconds in seconds.items():
            per_token = part_seconds / (responses * options.tokens) * 1e9
            table.add_row(part, f"{part_seconds:.2f}", f"{per_token:.0f}")
        console.print(f"{batch}x: {responses:,} responses of {options.tokens:,} tokens")
        console.print(table)
        console.print(f"{size / (responses * options.tokens):.1f} bytes per token are sent to every rank")


if __name__ == "__main__":
    main()
