"""Samples one batch of prompts on all engines, verifying finished groups while others are still being generated.

Each prompt goes, with all its samples, to the engine with the fewest outstanding tokens, so that the samples share the
prompt's cache. As soon as a group returns, its responses go to the reward pool while other prompts still generate.
In deterministic sampling nothing may depend on timing: each engine gets a fixed share of the prompts at once.

Faults. A failed call to a healthy engine is retried after a pause. An engine that is gone, or has passed no health
check for too long, is lost: its calls go to the others at once. When no living engine can take the remaining calls,
`EnginesLostError` hands the batch back, to be continued once the engines have been restarted. Samples keep their seeds
throughout, and a call's answer is used once: no sample is lost or duplicated.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dsrl.rewards.pool import RewardPool, Verdict
from megatron_dsrl.rollout.batch import Call, RolloutBatch
from megatron_dsrl.rollout.engine_choice import EngineChoice, Load
from megatron_dsrl.rollout.engines.client import BadRequestError, Completion, EngineClient, EngineError
from megatron_dsrl.rollout.open_files import TooManyOpenFilesError, requests_at_a_time, warn_of_few_requests
from megatron_dsrl.rollout.progress import EngineCall, OnCall, OnGroup, OnSamples
from megatron_dsrl.rollout.sample import Sample, SampleGroup
from megatron_dsrl.rollout.unfinished import PartialResponse, UnfinishedGroup

Decode = Callable[[Sequence[int]], str]
"""Token ids to text without special tokens."""

STRAGGLERS_IN_ERROR = 8
CALLS_WITHOUT_FILES = 10
"""Calls in a row that may find no file descriptor while none is in flight before that is an error."""
FIRST_BACK_OFF_SECONDS = 1.0
"""Pause before the second attempt; doubled for each further one."""
ABORT_AGAIN_SECONDS = 1.0
"""Interval between aborts: a call that reaches the engine just after one is caught by the next."""
ABORT_LIMIT_SECONDS = 60.0
MONITOR_GRACE_SECONDS = 5.0
"""Time for a health check in progress to finish when the batch ends, so that it does not run into the next batch."""


class StaleWeightsError(EngineError):
    """A sample was generated with weights other than the current ones."""


class EnginesLostError(EngineError):
    """No living engine can take the rest of the batch."""


@dataclass(frozen=True)
class Running:
    """A call that an engine is working on."""

    call: Call
    engine: int
    load: Load
    started: float
    """On the monotonic clock."""


class Dispatcher:
    """Works on one batch until it is finished, has enough, or no engine is left."""

    def __init__(
        self,
        batch: RolloutBatch,
        clients: Sequence[EngineClient],
        lost: dict[int, str],
        rewards: RewardPool,
        decode: Decode,
        on_samples: OnSamples,
        on_group: OnGroup,
        on_call: OnCall,
    ) -> None:
        """
        Args:
            batch: its state is updated in place.
            clients: one per engine.
            lost: why an engine must not be used, by engine number. Engines lost during the batch are added.
            rewards: judges responses.
            decode: turns response tokens into text.
            on_samples: see `progress.OnSamples`; `on_group` and `on_call` too.
        """
        self._batch = batch
        self._request = batch.request
        self._clients = clients
        self._lost = lost
        self._rewards = rewards
        self._decode = decode
        self._on_samples = on_samples
        self._on_group = on_group
        self._on_call = on_call
        self._engine_choice = EngineChoice(
            len(clients), self._request.max_outstanding_samples, self._request.sampling.max_response_tokens, set(lost)
        )
        self._running: dict[asyncio.Task[list[Completion]], Running] = {}
        self._judging: dict[asyncio.Task[SampleGroup], int] = {}
        self._monitors: dict[asyncio.Task[str], int] = {}
        self._ended = asyncio.Event()
        self._max_calls = requests_at_a_time()
        self._is_held_back = False
        """Whether calls have waited for file descriptors."""
        self._calls_without_files = 0
        """Calls that found no file descriptor since the last that did."""

    async def run(self) -> None:
        """Sample the batch.

        Raises:
            TooManyOpenFilesError: not even a single call can get a file descriptor.
            EnginesLostError: the batch can continue once engines have been restarted.
            StaleWeightsError: a sample does not have the requested weight version.
            EngineError: an engine rejected a request, or the batch took longer than its limit; the message names the
                prompts.
        """
        self._monitors = {
            asyncio.create_task(self._monitor(client)): engine
            for engine, client in enumerate(self._clients)
            if engine not in self._lost
        }
        try:
            while not self._request.feed.is_enough():
                self._batch.top_up()
                self._send()
                if not self._running and not self._judging:
                    if not self._batch.waiting:
                        return
                    if not any(map(self._has_engine, self._batch.waiting)):
                        raise EnginesLostError("\n".join(self._lost.values()))
                await self._wait()
            await self._abort_surplus()
        finally:
            await self._stop()

    # ---- sending

    def _send(self) -> None:
        """Send the calls that are due, as long as engines have room."""
        now = time.monotonic()
        for call in list(self._batch.waiting):
            if call.not_before > now or not self._has_engine(call):
                continue
            load = self._engine_choice.load_of([self._batch.groups[position] for position in call.positions])
            engine = self._engine_choice.choose(load) if call.engine is None else call.engine
            if engine is None:
                return
            if len(self._running) >= self._max_calls:
                if not self._is_held_back:
                    warn_of_few_requests(self._max_calls)
                self._is_held_back = True
                return
            self._batch.waiting.remove(call)
            self._engine_choice.begin(engine, load)
            requests = [
                request
                for position in call.positions
                for request in self._batch.groups[position].requests(self._request.sampling.max_response_tokens)
            ]
            answer = self._clients[engine].generate(
                requests, self._request.sampling, self._request.call_timeout_seconds
            )
            self._running[asyncio.create_task(answer)] = Running(call, engine, load, now)

    def _has_engine(self, call: Call) -> bool:
        """Whether a living engine can take the call."""
        if call.engine is not None:
            return call.engine not in self._lost
        return len(self._lost) < len(self._clients)

    # ---- waiting

    async def _wait(self) -> None:
        """Wait for the next event and handle it."""
        now = time.monotonic()
        wake = min([self._batch.deadline, *(c.not_before for c in self._batch.waiting if c.not_before > now)])
        tasks: list[asyncio.Task[Any]] = [*self._running, *self._judging, *self._monitors]
        done, _ = await asyncio.wait(tasks, timeout=max(0.0, wake - now), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task in self._running:
                await self._returned(task)
            elif task in self._judging:
                self._judged(task)
            elif task in self._monitors:
                self._lose(self._monitors.pop(task), task.result())
        if not done and time.monotonic() >= self._batch.deadline:
            raise EngineError(self._timeout_message())

    async def _returned(self, task: asyncio.Task[list[Completion]]) -> None:
        running = self._running.pop(task)
        self._engine_choice.end(running.engine, running.load)
        try:
            completions = task.result()
        except BadRequestError as error:
            self._report(running, str(error))
            raise
        except TooManyOpenFilesError as error:
            self._report(running, str(error))
            self._wait_for_files(running, error)
            return
        except EngineError as error:
            self._report(running, str(error))
            await self._failed(running, error)
            return
        self._calls_without_files = 0
        self._take(running, completions)
        unfinished = tuple(p for p in running.call.positions if not self._batch.groups[p].is_complete)
        if unfinished:  # the engine aborted without being asked
            self._retry(running, EngineError("the engine aborted it"))

    def _take(self, running: Running, completions: Sequence[Completion]) -> None:
        """Add the completions to the call's groups; complete groups go to the verifier."""
        call, answers = running.call, iter(completions)
        aborted = any(completion.finish_reason == "abort" for completion in completions)
        self._report(running, "aborted" if aborted else "done", sum(len(c.response_ids) for c in completions))
        for position in call.positions:
            group = self._batch.groups[position]
            mine = [next(answers) for _ in range(group.num_unfinished)]
            self._check_versions(group, mine)
            for response in mine:
                if response.finish_reason != "abort":
                    self._engine_choice.learn(len(response.response_ids))
            self._on_samples(sum(response.finish_reason != "abort" for response in mine))
            self._batch.groups[position] = group = group.extended(mine)
            if group.is_complete:
                self._judging[asyncio.create_task(self._judge(group))] = position

    def _check_versions(self, group: UnfinishedGroup, completions: Sequence[Completion]) -> None:
        current = self._request.weight_version
        for completion in completions:
            versions = {version for version, _ in completion.weight_versions}
            if versions - {current} or (completion.response_ids and not versions):
                raise StaleWeightsError(
                    f"a sample of prompt {group.prompt.index} was generated with weight version {sorted(versions)}, "
                    f"the current one is {current}"
                )

    # ---- verification

    async def _judge(self, group: UnfinishedGroup) -> SampleGroup:
        texts = [self._decode(response.response_ids) for response in group.responses]
        prompt = group.prompt
        about = (prompt.answer, prompt.other_answers, prompt.text, prompt.prompt_set)
        judgements = [self._rewards.submit(text, *about) for text in texts]
        samples = []
        for response, text, judgement in zip(group.responses, texts, judgements, strict=True):
            try:
                limit = max(0.1, self._batch.deadline - time.monotonic())
                judged = await asyncio.wait_for(asyncio.wrap_future(judgement), limit)
            except TimeoutError as error:
                raise EngineError(
                    "rewards were not ready within rollout.step_timeout_seconds = "
                    f"{self._request.timeout_seconds:g}; raise the limit or reward.workers, or lower "
                    "reward.timeout_seconds"
                ) from error
            samples.append(_sample(response, text, judged.reward, judged.verdict, self._request.weight_version))
        return SampleGroup(group.prompt, tuple(samples))

    def _judged(self, task: asyncio.Task[SampleGroup]) -> None:
        group = task.result()
        position = self._judging.pop(task)
        self._batch.finished[position] = group
        self._request.feed.judged(group)
        self._on_group(position, group)

    # ---- faults

    async def _monitor(self, client: EngineClient) -> str:
        """Returns when the engine is lost, with the reason, or when the batch has ended."""
        healthy = time.monotonic()
        while not self._ended.is_set():
            try:
                await asyncio.wait_for(self._ended.wait(), self._request.health_check_seconds)
            except TimeoutError:
                try:
                    await client.check_health(self._request.health_timeout_seconds)
                    healthy = time.monotonic()
                except EngineError as error:
                    if time.monotonic() - healthy > self._request.health_timeout_seconds:
                        return f"{error}; it has passed no health check for engine.health_timeout_seconds"
                except TooManyOpenFilesError:  # says nothing about the engine
                    healthy = time.monotonic()
        return ""

    async def _failed(self, running: Running, error: EngineError) -> None:
        """Find out whether a failed call means that the engine is lost, or can be retried."""
        if running.engine in self._lost:  # another call of an engine already known to be lost
            self._batch.waiting.appendleft(running.call)
            return
        try:
            await self._clients[running.engine].check_health(self._request.health_timeout_seconds)
        except EngineError:
            self._batch.waiting.appendleft(running.call)
            self._lose(running.engine, str(error))
        except TooManyOpenFilesError as files_error:
            self._wait_for_files(running, files_error)
        else:
            self._retry(running, error)

    def _wait_for_files(self, running: Running, error: TooManyOpenFilesError) -> None:
        """Queue a call again that got no file descriptor, and have fewer in flight. The engine is not to blame."""
        self._calls_without_files += 1
        if not self._running and self._calls_without_files >= CALLS_WITHOUT_FILES:
            raise error
        self._max_calls = max(1, min(self._max_calls, len(self._running)))
        running.call.not_before = time.monotonic() + FIRST_BACK_OFF_SECONDS
        self._batch.waiting.appendleft(running.call)

    def _retry(self, running: Running, error: EngineError) -> None:
        """Queue the call again after a pause, for any engine that may take it."""
        call = running.call
        call.attempts += 1
        if call.attempts >= self._request.call_attempts:
            prompts = ", ".join(str(self._prompt(position)) for position in call.positions)
            raise EngineError(
                f"{error}\nThat was the last attempt for prompt {prompts} (rollout.request_attempts = "
                f"{call.attempts}); the engine is otherwise healthy"
            )
        self._batch.retries += 1
        call.not_before = time.monotonic() + FIRST_BACK_OFF_SECONDS * 2 ** (call.attempts - 1)
        call.positions = tuple(p for p in call.positions if not self._batch.groups[p].is_complete)
        self._batch.waiting.appendleft(call)

    def _lose(self, engine: int, problem: str) -> None:
        """Stop using the engine and requeue its calls for the others."""
        self._lost[engine] = problem
        self._engine_choice.lost.add(engine)
        for task, running in list(self._running.items()):
            if running.engine == engine:
                task.cancel()
                del self._running[task]
                self._report(running, problem)
                self._engine_choice.end(engine, running.load)
                self._batch.waiting.appendleft(running.call)
        for monitor, monitored in list(self._monitors.items()):
            if monitored == engine:
                monitor.cancel()
                del self._monitors[monitor]

    # ---- the end

    async def _abort_surplus(self) -> None:
        """Abort running calls and keep their tokens; groups that turn out complete are judged."""
        deadline = time.monotonic() + ABORT_LIMIT_SECONDS
        while self._running and time.monotonic() < deadline:
            for engine in {running.engine for running in self._running.values()}:
                try:
                    await self._clients[engine].abort_all()
                except EngineError as error:
                    self._lose(engine, str(error))
                except TooManyOpenFilesError:
                    pass  # the next round may find one
            if self._running:
                done, _ = await asyncio.wait(self._running, timeout=ABORT_AGAIN_SECONDS)
                for task in done:
                    running = self._running.pop(task)
                    if task.exception() is None:  # otherwise the group stays as it was before this call
                        self._take(running, task.result())
                    else:
                        self._report(running, str(task.exception()))
        while self._judging:
            judged, _ = await asyncio.wait(self._judging, return_when=asyncio.FIRST_COMPLETED)
            for judgement in judged:
                self._judged(judgement)

    async def _stop(self) -> None:
        self._ended.set()
        for running in self._running.values():
            self._report(running, "cancelled")
        for task in (*self._running, *self._judging):
            task.cancel()  # closes the connection, which makes SGLang abort the request
        await asyncio.gather(*self._running, *self._judging, return_exceptions=True)
        if self._monitors:
            await asyncio.wait(self._monitors, timeout=MONITOR_GRACE_SECONDS)
            for task in self._monitors:
                task.cancel()
            await asyncio.gather(*self._monitors, return_exceptions=True)

    def _report(self, running: Running, outcome: str, tokens: int = 0) -> None:
        """Pass a finished call to the observer."""
        prompts = tuple(self._prompt(position) for position in running.call.positions)
        attempt, ended = running.call.attempts + 1, time.monotonic()
        self._on_call(EngineCall(running.engine, prompts, tokens, attempt, outcome, running.started, ended))

    def _prompt(self, position: int) -> int:
        """Index of the prompt at this position of the batch, as users know it."""
        return self._batch.groups[position].prompt.index

    def _timeout_message(self) -> str:
        """Names the late prompts, the longest running first."""
        now = time.monotonic()
        late = [
            f"prompt {self._prompt(position)} on {self._clients[running.engine].url} for {now - running.started:.0f} s"
            for running in sorted(self._running.values(), key=lambda running: running.started)
            for position in running.call.positions
        ]
        late += [
            f"prompt {self._prompt(position)} in the queue"
            for call in self._batch.waiting
            for position in call.positions
        ]
        late += [f"prompt {self._prompt(position)} at the verifier" for position in self._judging.values()]
        more = f" and {len(late) - STRAGGLERS_IN_ERROR} more" if len(late) > STRAGGLERS_IN_ERROR else ""
        return (
            f"generation took longer than rollout.step_timeout_seconds = {self._request.timeout_seconds:g}; not "
            f"finished (prompts by index): {', '.join(late[:STRAGGLERS_IN_ERROR])}{more}"
        )


def _sample(response: PartialResponse, text: str, reward: float, verdict: Verdict, weight_version: int) -> Sample:
    """Make a sample of a finished response. Its last token is older than `weight_version` only if it ended earlier."""
    assert response.finish_reason is not None
    versions = response.weight_versions or ((weight_version, 0),)
    return Sample(
        response_ids=response.response_ids,
        log_probs=response.log_probs,
        text=text,
        finish_reason=response.finish_reason,
        weight_version=versions[-1][0],
        reward=reward,
        verdict=verdict,
        older_versions=versions[:-1],
        routed_experts=response.routed_experts,
    )
