"""The calls that engines are working on: which engine gets the next one, and how many run at a time.

Each prompt goes, with all its samples, to the engine with the fewest outstanding tokens, so that the samples share the
prompt's cache. In deterministic sampling nothing may depend on timing: each call names its engine.
"""

import asyncio
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass

from megatron_dsrl.observability.timeline import EngineCall
from megatron_dsrl.rollout.batch import Call, OnCall, RolloutBatch
from megatron_dsrl.rollout.engine_health import EngineStates
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.generation import Completion
from megatron_dsrl.rollout.open_files import RequestLimit
from megatron_dsrl.rollout.unfinished import UnfinishedGroup


@dataclass(frozen=True)
class Load:
    """The load that a call puts on its engine."""

    samples: int
    tokens: float


@dataclass
class EngineChoice:
    """Tracks the outstanding work of every engine and chooses the next one.

    A group counts as the tokens that it will occupy: its prompt once, since its samples share it, and the expected rest
    of every unfinished response. The expected length is the mean of the batch's finished responses, or the length limit
    until there are any.
    """

    num_engines: int
    max_outstanding_samples: int
    """Samples that one engine holds at a time. An idle engine takes any call."""
    max_response_tokens: int
    lost: Container[int] = ()
    """Engines that must not be chosen; the caller may add to it."""

    def __post_init__(self) -> None:
        self._samples = [0] * self.num_engines
        self._tokens = [0.0] * self.num_engines
        self._finished_responses = 0
        self._finished_tokens = 0

    @property
    def expected_response_tokens(self) -> float:
        """The mean length of the responses so far, or their limit until there is one."""
        if self._finished_responses == 0:
            return self.max_response_tokens
        return self._finished_tokens / self._finished_responses

    def load_of(self, groups: list[UnfinishedGroup]) -> Load:
        """The requests of a call with these groups, and the tokens that it is expected to cost."""
        tokens = 0.0
        for group in groups:
            tokens += len(group.prompt.token_ids)
            for response in group.responses:
                if response.finish_reason is None:
                    tokens += max(1.0, self.expected_response_tokens - len(response.response_ids))
        return Load(sum(group.num_unfinished for group in groups), tokens)

    def choose(self, load: Load) -> int | None:
        """The living engine with the fewest outstanding tokens among those with room; None if none has room."""
        free = [
            engine
            for engine in range(self.num_engines)
            if engine not in self.lost
            and (self._samples[engine] == 0 or self._samples[engine] + load.samples <= self.max_outstanding_samples)
        ]
        return min(free, key=self._tokens.__getitem__, default=None)

    def start(self, engine: int, load: Load) -> None:
        self._samples[engine] += load.samples
        self._tokens[engine] += load.tokens

    def finish(self, engine: int, load: Load) -> None:
        self._samples[engine] -= load.samples
        self._tokens[engine] -= load.tokens

    def learn(self, response_tokens: int) -> None:
        self._finished_responses += 1
        self._finished_tokens += response_tokens


CallTask = asyncio.Task[list[Completion]]


@dataclass(frozen=True)
class RunningCall:
    """A call that an engine is working on."""

    call: Call
    engine: int
    load: Load
    started: float
    """On the monotonic clock."""
    connections: int
    """HTTP requests that it may have at a time."""


class EngineCalls:
    """Sends the batch's waiting calls and keeps account of those that run."""

    def __init__(
        self, batch: RolloutBatch, clients: Sequence[EngineClient], states: EngineStates, on_call: OnCall
    ) -> None:
        self.running: dict[CallTask, RunningCall] = {}
        self.connections = 0
        """HTTP requests in flight."""
        self.limit = RequestLimit()
        self._batch = batch
        self._clients = clients
        self._lost = states.lost.keys()
        self._use = states.use
        self._on_call = on_call
        most = batch.request.settings.engine.max_outstanding_samples
        self._choice = EngineChoice(len(clients), most, batch.request.sampling.max_response_tokens, self._lost)

    def has_engine(self, call: Call) -> bool:
        if call.engine is not None:
            return call.engine not in self._lost
        return len(self._lost) < len(self._clients)

    def send_due(self) -> None:
        now = time.monotonic()
        for call in list(self._batch.waiting):
            if call.not_before > now or not self.has_engine(call):
                continue
            load = self._choice.load_of([self._batch.groups[position] for position in call.positions])
            engine = self._choice.choose(load) if call.engine is None else call.engine
            if engine is None or self.limit.is_reached(self.connections):
                return
            self._batch.waiting.remove(call)
            self._choice.start(engine, load)
            self._use.started(engine)
            running = RunningCall(call, engine, load, now, self._batch.connections(call))
            self.connections += running.connections
            self.running[asyncio.create_task(self._batch.ask(call, self._clients[engine]))] = running

    def finish(self, task: CallTask) -> RunningCall:
        running = self.running.pop(task)
        self.connections -= running.connections
        self._choice.finish(running.engine, running.load)
        self._use.ended(running.engine)
        return running

    def learn(self, completions: Sequence[Completion]) -> None:
        """Note the lengths of finished responses, from which the load of later calls is estimated."""
        for completion in completions:
            if completion.finish_reason != "abort":
                self._choice.learn(len(completion.response_ids))

    def drop(self, engine: int, problem: str) -> None:
        """Cancel the calls of an engine that is lost and put them back for the others."""
        for task, running in list(self.running.items()):
            if running.engine == engine:
                task.cancel()
                self.finish(task)
                self.report(running, problem)
                self._batch.put_back(running.call)

    async def cancel(self) -> None:
        """Cancel all calls. This closes their connections, which makes SGLang abort the requests."""
        for task, running in self.running.items():
            self.report(running, "cancelled")
            self._use.ended(running.engine)
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)

    def report(self, running: RunningCall, outcome: str, tokens: int = 0) -> None:
        call = running.call
        prompts, attempt, ended = self._batch.prompt_indices(call), call.attempts + 1, time.monotonic()
        self._on_call(EngineCall(running.engine, prompts, tokens, attempt, outcome, running.started, ended))
