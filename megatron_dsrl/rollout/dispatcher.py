"""Samples one batch of prompts on all engines, verifying finished groups while others are still being generated.

`EngineCalls` sends the calls, `GroupJudge` judges complete groups, `EngineHealth` watches the engines, and the
`RolloutBatch` holds what has been sampled. The dispatcher waits for the next event and reacts to it.

Faults. A failed call to a healthy engine is retried after a pause. An engine that is gone, or has passed no health
check for too long, is lost: its calls go to the others at once. When no living engine can take the remaining calls,
`EnginesLostError` hands the batch back, to be continued once the engines have been restarted. Samples keep their seeds
throughout, and a call's answer is used once: no sample is lost or duplicated.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dsrl.rewards.pool import RewardPool, Verdict
from megatron_dsrl.rollout.batch import FIRST_BACK_OFF_SECONDS, BatchProgress, RolloutBatch
from megatron_dsrl.rollout.engine_calls import CallTask, EngineCalls, RunningCall
from megatron_dsrl.rollout.engine_health import EngineHealth, EngineStates
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import BadRequestError, EngineError, EnginesLostError
from megatron_dsrl.rollout.engines.generation import Completion
from megatron_dsrl.rollout.growing_response import Decode
from megatron_dsrl.rollout.open_files import TooManyOpenFilesError
from megatron_dsrl.rollout.sample import Sample, SampleGroup
from megatron_dsrl.rollout.unfinished import PartialResponse, UnfinishedGroup

STRAGGLERS_IN_ERROR = 8
ABORT_AGAIN_SECONDS = 1.0
"""Interval between aborts: a call that reaches the engine just after one is caught by the next."""
ABORT_LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class GroupJudge:
    """Makes samples of a group whose responses are complete: decodes them and has the reward pool judge them."""

    rewards: RewardPool
    decode: Decode

    async def judge(self, group: UnfinishedGroup, batch: RolloutBatch) -> SampleGroup:
        """The group's samples. Raises EngineError if their rewards are not ready by the batch's deadline."""
        texts = [self.decode(response.response_ids) for response in group.responses]
        prompt = group.prompt
        about = (prompt.answer, prompt.other_answers, prompt.text, prompt.prompt_set)
        judgements = [self.rewards.submit(text, *about) for text in texts]
        samples = []
        for response, text, judgement in zip(group.responses, texts, judgements, strict=True):
            try:
                limit = max(0.1, batch.deadline - time.monotonic())
                judged = await asyncio.wait_for(asyncio.wrap_future(judgement), limit)
            except TimeoutError as error:
                raise EngineError(
                    "rewards were not ready within rollout.step_timeout_seconds = "
                    f"{batch.request.timeout_seconds:g}; raise the limit or reward.workers, or lower "
                    "reward.timeout_seconds"
                ) from error
            samples.append(_sample(response, text, judged.reward, judged.verdict, batch.request.versions().start))
        return SampleGroup(prompt, tuple(samples))


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
        reward=reward + sum(value for _, value in response.turn_rewards),
        verdict=verdict,
        older_versions=versions[:-1],
        routed_experts=response.routed_experts,
        scored=response.scored,
        turn_rewards=response.turn_rewards,
    )


class Dispatcher:
    """Works on one batch until it is finished, has enough, or no engine is left."""

    def __init__(
        self,
        batch: RolloutBatch,
        clients: Sequence[EngineClient],
        states: EngineStates,
        judge: GroupJudge,
        progress: BatchProgress,
    ) -> None:
        """The batch is updated in place, and the states with engines that are lost meanwhile. One client per engine."""
        self._batch = batch
        self._clients = clients
        self._lost = states.lost
        self._judge = judge
        self._progress = progress
        self._calls = EngineCalls(batch, clients, states, progress.on_call)
        engine = batch.request.settings.engine
        self._health = EngineHealth(clients, engine.health_check_seconds, engine.health_timeout_seconds, states)
        self._wake = batch.request.feed.wake
        self._news: asyncio.Task[None] | None = None
        """Ends when the feed has more to give."""
        self._judging: dict[asyncio.Task[SampleGroup], int] = {}
        """The position of each group that is being judged."""

    async def run(self) -> None:
        """Sample the batch.

        Raises:
            TooManyOpenFilesError: not even a single call can get a file descriptor.
            EnginesLostError: the batch can continue once engines have been restarted.
            StaleWeightsError: a sample does not have the requested weight version.
            EngineError: an engine rejected a request, or the batch took longer than its limit; the message names the
                prompts.
        """
        if self._wake:
            self._wake.attach()
        try:
            while not self._batch.request.feed.is_enough():
                # an engine that was lost may be back
                self._health.watch(engine for engine in range(len(self._clients)) if engine not in self._lost)
                self._listen()
                self._batch.top_up()
                self._calls.send_due()
                if not self._calls.running and not self._judging:
                    if not self._batch.waiting and self._wake is None:
                        return
                    if self._batch.waiting and not any(map(self._calls.has_engine, self._batch.waiting)):
                        raise EnginesLostError("\n".join(list(self._lost.values())))
                await self._handle_next_events()
            await self._abort_surplus()
        finally:
            await self._stop()

    async def _handle_next_events(self) -> None:
        """Wait until something happens or a waiting call is due, and react. Raises EngineError when the batch's time is
        up."""
        now = time.monotonic()
        wake = min([self._batch.deadline, *(c.not_before for c in self._batch.waiting if c.not_before > now)])
        tasks: list[asyncio.Task[Any]] = [*self._calls.running, *self._judging, *self._health.monitors]
        tasks += [self._news] if self._news else []
        done, _ = await asyncio.wait(tasks, timeout=max(0.0, wake - now), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if task in self._calls.running:
                await self._answered(task)
            elif task in self._judging:
                self._judged(task)
            elif task in self._health.monitors:
                self._lose(self._health.monitors[task], task.result())
        if not done and time.monotonic() >= self._batch.deadline:
            raise EngineError(self._timeout_message())

    # ---- what happens

    async def _answered(self, task: CallTask) -> None:
        running = self._calls.finish(task)
        try:
            completions = task.result()
        except (EngineError, TooManyOpenFilesError) as error:
            self._calls.report(running, str(error))
            await self._failed(running, error)
            return
        self._calls.limit.request_answered()
        self._take(running, completions)
        if not self._batch.is_answered(running.call):  # the engine aborted without being asked
            self._batch.retry(running.call, EngineError("the engine aborted it"))

    def _listen(self) -> None:
        """Have the feed interrupt the next wait."""
        if self._wake and (self._news is None or self._news.done()):
            self._news = asyncio.create_task(self._wake.wait())

    def _take(self, running: RunningCall, completions: Sequence[Completion]) -> None:
        """Add the completions to the call's groups; complete groups go to the verifier."""
        aborted = any(completion.finish_reason == "abort" for completion in completions)
        tokens = sum(len(completion.response_ids) for completion in completions)
        self._calls.report(running, "aborted" if aborted else "done", tokens)
        self._calls.learn(completions)
        for position, answers in self._batch.split(running.call, completions):
            group = self._batch.extend(position, answers, running.call.oldest_version)
            self._progress.on_samples(sum(answer.finish_reason != "abort" for answer in answers))
            if group.is_complete:
                self._judging[asyncio.create_task(self._judge.judge(group, self._batch))] = position

    def _judged(self, task: asyncio.Task[SampleGroup]) -> None:
        group = task.result()
        position = self._judging.pop(task)
        self._batch.finish(position, group)
        self._progress.on_group(position, group)

    async def _failed(self, running: RunningCall, error: EngineError | TooManyOpenFilesError) -> None:
        """A call failed: find out whether its engine is lost, or it can be retried."""
        if isinstance(error, BadRequestError):
            raise error
        if isinstance(error, TooManyOpenFilesError):
            self._wait_for_files(running, error)
            return
        if running.engine in self._lost:  # another call of an engine already known to be lost
            self._batch.put_back(running.call)
            return
        try:
            await self._health.check(running.engine)
        except EngineError:
            self._batch.put_back(running.call)
            self._lose(running.engine, str(error))
        except TooManyOpenFilesError as files_error:
            self._wait_for_files(running, files_error)
        else:
            self._batch.retry(running.call, error)

    def _wait_for_files(self, running: RunningCall, error: TooManyOpenFilesError) -> None:
        """Queue a call again that got no file descriptor, and have fewer in flight. The engine is not to blame."""
        self._calls.limit.request_failed(self._calls.connections, error)
        self._batch.put_back(running.call, FIRST_BACK_OFF_SECONDS)

    def _lose(self, engine: int, problem: str) -> None:
        """Stop using the engine and requeue its calls for the others."""
        self._lost[engine] = problem
        self._calls.drop(engine, problem)
        self._health.stop_watching(engine)

    # ---- the end

    async def _abort_surplus(self) -> None:
        """Abort running calls and keep their tokens; groups that turn out complete are judged."""
        deadline = time.monotonic() + ABORT_LIMIT_SECONDS
        while self._calls.running and time.monotonic() < deadline:
            for engine in {running.engine for running in self._calls.running.values()}:
                try:
                    await self._clients[engine].abort_all()
                except EngineError as error:
                    self._lose(engine, str(error))
                except TooManyOpenFilesError:
                    pass  # the next round may find one
            if self._calls.running:
                done, _ = await asyncio.wait(self._calls.running, timeout=ABORT_AGAIN_SECONDS)
                for task in done:
                    running = self._calls.finish(task)
                    if task.exception() is None:  # otherwise the group stays as it was before this call
                        self._take(running, task.result())
                    else:
                        self._calls.report(running, str(task.exception()))
        while self._judging:
            judged, _ = await asyncio.wait(self._judging, return_when=asyncio.FIRST_COMPLETED)
            for judgement in judged:
                self._judged(judgement)

    async def _stop(self) -> None:
        if self._news:
            self._news.cancel()
        for task in self._judging:
            task.cancel()
        await self._calls.cancel()
        await asyncio.gather(*self._judging, return_exceptions=True)
        await self._health.close()

    def _timeout_message(self) -> str:
        """Names the late prompts, the longest running first."""
        now, batch = time.monotonic(), self._batch
        late = [
            f"prompt {prompt} on {self._clients[running.engine].url} for {now - running.started:.0f} s"
            for running in sorted(self._calls.running.values(), key=lambda running: running.started)
            for prompt in batch.prompt_indices(running.call)
        ]
        late += [f"prompt {prompt} in the queue" for call in batch.waiting for prompt in batch.prompt_indices(call)]
        late += [f"prompt {batch.groups[position].prompt.index} at the verifier" for position in self._judging.values()]
        more = f" and {len(late) - STRAGGLERS_IN_ERROR} more" if len(late) > STRAGGLERS_IN_ERROR else ""
        return (
            f"generation took longer than rollout.step_timeout_seconds = {batch.request.timeout_seconds:g}; not "
            f"finished (prompts by index): {', '.join(late[:STRAGGLERS_IN_ERROR])}{more}"
        )
