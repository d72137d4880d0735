"""One batch of prompts over all engines, with verification running beside generation.

Each prompt goes, with all its samples, to the engine with the least outstanding work, so that the samples share the
prompt's cache. As soon as a group returns, its responses are in the reward pool while other prompts still generate.
In deterministic sampling nothing may depend on who is first: each engine gets a fixed part of the prompts at once.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rewards.pool import Judgement, RewardPool
from megatron_dsrl.rollout.client import Completion, EngineClient, EngineError, SampleRequest
from megatron_dsrl.rollout.sample import Group, Sample
from megatron_dsrl.rollout.sampling import SamplingParameters

Decode = Callable[[Sequence[int]], str]
"""Token ids to text without special tokens."""

PROMPTS_IN_ERROR = 8


class StaleWeightsError(EngineError):
    """A sample came from other weights than the current ones."""


@dataclass(frozen=True)
class BatchRequest:
    """What one batch asks for."""

    prompts: Sequence[Prompt]
    seeds: Sequence[tuple[int, ...]]
    """For every prompt one seed per sample, the same number of them for all prompts."""
    sampling: SamplingParameters
    weight_version: int
    """The version that every sample must carry."""
    deterministic: bool
    """Prompt i goes to engine i modulo their number, and an engine gets all its prompts in one call."""
    max_outstanding_samples: int
    """Samples that one engine holds at a time; further prompts wait for the engine that frees up first. Without
    effect on deterministic batches."""
    timeout_seconds: float
    """Limit for the whole batch, verification included."""

    @property
    def samples_per_prompt(self) -> int:
        """The group size."""
        return len(self.seeds[0])

    def of_prompts(self, positions: Sequence[int]) -> list[SampleRequest]:
        """All samples of the prompts at these positions, prompt after prompt."""
        return [SampleRequest(self.prompts[i].token_ids, seed) for i in positions for seed in self.seeds[i]]


async def sample_groups(
    request: BatchRequest,
    clients: Sequence[EngineClient],
    rewards: RewardPool,
    decode: Decode,
    on_samples: Callable[[int], None],
    on_group: Callable[[Group], None],
) -> list[Group]:
    """Sample, decode and judge; groups are in the order of the prompts.

    `on_samples` is told how many samples have come back, each time some do; `on_group` gets every group as soon as it
    is judged, in any order.

    Raises:
        EngineError: An engine failed, or the batch took longer than its limit; the message names the prompts that
            were still running.
        StaleWeightsError: A sample does not carry the requested weight version.
    """
    deadline = time.monotonic() + request.timeout_seconds
    judged: dict[int, asyncio.Task[Group]] = {}
    waiting = deque(range(len(request.prompts)))
    running: dict[asyncio.Task[list[Completion]], tuple[Sequence[int], int]] = {}  # task -> (prompt positions, engine)
    outstanding = [0] * len(clients)

    def start(positions: Sequence[int], engine: int) -> None:
        call = clients[engine].generate(request.of_prompts(positions), request.sampling)
        running[asyncio.create_task(call)] = (positions, engine)
        outstanding[engine] += len(positions) * request.samples_per_prompt

    try:
        if request.deterministic:
            for engine in range(min(len(clients), len(request.prompts))):
                start(range(len(request.prompts))[engine :: len(clients)], engine)
            waiting.clear()
        while waiting or running:
            while waiting and (engine := _free_engine(outstanding, request)) is not None:
                start([waiting.popleft()], engine)
            done, _ = await asyncio.wait(
                running, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise EngineError(_timeout_message(request, waiting, running))
            for task in done:
                positions, engine = running.pop(task)
                outstanding[engine] -= len(positions) * request.samples_per_prompt
                completions = iter(task.result())
                for position in positions:
                    prompt = request.prompts[position]
                    group = list(islice(completions, request.samples_per_prompt))
                    submitted = [
                        (completion, text := decode(completion.response_ids), rewards.submit(text, prompt.answer))
                        for completion in _checked(group, prompt, request.weight_version)
                    ]
                    judged[position] = asyncio.create_task(_judge(prompt, submitted, request, deadline, on_group))
                on_samples(len(positions) * request.samples_per_prompt)
    finally:
        for task in running:
            task.cancel()  # closes the connection, at which SGLang aborts the request
        await asyncio.gather(*running, return_exceptions=True)
    return [await judged[position] for position in range(len(request.prompts))]


async def _judge(
    prompt: Prompt,
    submitted: Sequence[tuple[Completion, str, "Future[Judgement]"]],
    request: BatchRequest,
    deadline: float,
    on_group: Callable[[Group], None],
) -> Group:
    group = Group(prompt, tuple([await _sample(*entry, request, deadline) for entry in submitted]))
    on_group(group)
    return group


def _free_engine(outstanding: Sequence[int], request: BatchRequest) -> int | None:
    """The engine with the least outstanding work, or None when all are full. An idle engine is never full."""
    engine = min(range(len(outstanding)), key=outstanding.__getitem__)
    full = outstanding[engine] + request.samples_per_prompt > request.max_outstanding_samples
    return None if full and outstanding[engine] > 0 else engine


def _checked(completions: list[Completion], prompt: Prompt, version: int) -> list[Completion]:
    for completion in completions:
        if completion.weight_versions != {version}:
            raise StaleWeightsError(
                f"a sample of prompt {prompt.index} was generated with weight version "
                f"{sorted(completion.weight_versions)}, the current one is {version}"
            )
    return completions


async def _sample(
    completion: Completion, text: str, judgement: "Future[Judgement]", request: BatchRequest, deadline: float
) -> Sample:
    try:
        judged = await asyncio.wait_for(asyncio.wrap_future(judgement), max(0.1, deadline - time.monotonic()))
    except TimeoutError as error:
        raise EngineError(
            f"rewards were not ready within rollout.step_timeout_seconds = {request.timeout_seconds:g}; raise the "
            "limit or reward.workers, or lower reward.timeout_seconds"
        ) from error
    return Sample(
        response_ids=completion.response_ids,
        log_probs=completion.log_probs,
        text=text,
        finish_reason=completion.finish_reason,
        weight_version=request.weight_version,
        reward=judged.reward,
        verdict=judged.verdict,
    )


def _timeout_message(request: BatchRequest, waiting: Sequence[int], running: dict) -> str:
    unfinished = [request.prompts[position].index for positions, _ in running.values() for position in positions]
    unfinished += [request.prompts[position].index for position in waiting]
    named = ", ".join(map(str, sorted(unfinished)[:PROMPTS_IN_ERROR]))
    more = f" and {len(unfinished) - PROMPTS_IN_ERROR} more" if len(unfinished) > PROMPTS_IN_ERROR else ""
    return (
        f"generation took longer than rollout.step_timeout_seconds = {request.timeout_seconds:g}; prompts (by index) "
        f"still running: {named}{more}"
    )
