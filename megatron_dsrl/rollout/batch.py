"""A batch of prompts that is being sampled: where its groups come from, how far along they are, and who is notified.

It survives lost engines: only unfinished responses are requested again.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.observability.timeline import EngineCall
from megatron_dsrl.rollout.custom_generation import CustomGeneration
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import EngineError, StaleWeightsError
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest
from megatron_dsrl.rollout.sample import SampleGroup, SamplingParameters
from megatron_dsrl.rollout.unfinished import UnfinishedGroup

FIRST_BACK_OFF_SECONDS = 1.0
"""Pause before the second attempt; doubled before each later one."""


class Wake:
    """Tells the event loop of a batch that its feed has more to give. `set` may be called from any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

    def attach(self) -> None:
        """Wake the running event loop from now on."""
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def set(self) -> None:
        """Let `wait` return; no effect without an event loop."""
        loop, event = self._loop, self._event
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(event.set)

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()


class Feed(Protocol):
    """Source of a batch's groups; decides when there are enough."""

    @property
    def wake(self) -> Wake | None:
        """Set when there may be more to take although no group has been judged, or when there is enough. None: that
        never happens, and the batch ends when all that it has taken is judged."""

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        """Groups to start or to continue, given the number of groups in flight."""

    def judged(self, position: int, group: SampleGroup) -> None:
        """Called with every finished group, and its place in the order in which groups were taken, from 0."""

    def is_enough(self) -> bool:
        """Whether the groups still in flight should be aborted."""


class WholeFeed:
    """Gives all groups at once and needs all of them."""

    wake = None

    def __init__(self, groups: Sequence[UnfinishedGroup]) -> None:
        self._groups = list(groups)

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        groups, self._groups = self._groups, []
        return groups

    def judged(self, position: int, group: SampleGroup) -> None: ...

    def is_enough(self) -> bool:
        return False


OnSamples = Callable[[int], None]
"""Called with the number of samples that have just come back."""
OnGroup = Callable[[int, SampleGroup], None]
"""Called with every group and its position in the batch as soon as it is judged, in any order."""
OnCall = Callable[[EngineCall], None]
"""Called with every finished call to an engine."""


def ignore(*progress: object) -> None:
    """A callback that does nothing."""


@dataclass(frozen=True)
class BatchProgress:
    """Callbacks for what happens while a batch is sampled."""

    on_samples: OnSamples = ignore
    on_group: OnGroup = ignore
    on_call: OnCall = ignore


class BatchSampler(Protocol):
    """What samples a batch: `EngineRollout`."""

    weight_version: int
    """Version of the engines' current weights."""
    training_sampling: SamplingParameters

    def sample_batch(self, feed: Feed, sampling: SamplingParameters, on_samples: OnSamples) -> "RolloutBatch":
        """Sample and judge the feed's groups until it has enough, with the run's verifier."""

    def recover_engines(self) -> None:
        """Restart lost engines, if there are any, with the weights that they had. Only in the main thread."""


@dataclass(frozen=True)
class BatchRequest:
    """How a batch is sampled."""

    settings: RolloutSettings
    """Limits in the sections `rollout` and `engine`. With `rollout.deterministic`, group i goes to engine i modulo the
    number of engines, and each engine gets all its groups in one call."""
    feed: Feed
    sampling: SamplingParameters
    versions: Callable[[], range]
    """The weight versions that engines may have now: two while weights are being loaded. A token must carry one that an
    engine has had since its request was sent."""
    generation: CustomGeneration | None = None
    """Writes the responses together with the engine; None: the engine alone writes them."""

    @property
    def timeout_seconds(self) -> float:
        """Limit for the whole batch, verification included. The batch of a feed that grows outlives steps: no limit."""
        return math.inf if self.feed.wake else self.settings.rollout.step_timeout_seconds


@dataclass
class Call:
    """Groups that are requested from an engine together."""

    positions: tuple[int, ...]
    engine: int | None = None
    """The only engine that may take it; None leaves the choice to `EngineChoice`."""
    attempts: int = 0
    """Number of failures so far."""
    not_before: float = 0.0
    """Earliest time to send it, on the monotonic clock: a failed call backs off."""
    oldest_version: int = 0
    """Oldest version that an engine had when it was sent."""


class RolloutBatch:
    """The groups of a batch. A group's position is its place in the order in which the feed gave them."""

    def __init__(self, request: BatchRequest, num_engines: int) -> None:
        self.request = request
        self.groups: dict[int, UnfinishedGroup] = {}
        """By position."""
        self.finished: dict[int, SampleGroup] = {}
        """Judged groups by position. A feed that grows keeps them itself: they are dropped here."""
        self.waiting: deque[Call] = deque()
        """Calls to make; failed ones come first."""
        self.deadline = time.monotonic() + request.timeout_seconds
        self.retries = 0
        self._num_engines = num_engines
        self._taken = 0

    @property
    def finished_groups(self) -> list[SampleGroup]:
        """Judged groups, by position."""
        return [self.finished[position] for position in sorted(self.finished)]

    @property
    def unfinished_groups(self) -> list[UnfinishedGroup]:
        """Groups that are not judged yet, by position."""
        return [group for position, group in self.groups.items() if position not in self.finished]

    def prompt_indices(self, call: Call) -> tuple[int, ...]:
        """The row numbers of a call's prompts, as users know them."""
        return tuple(self.groups[position].prompt.index for position in call.positions)

    def top_up(self) -> None:
        """Take more groups from the feed."""
        first = self._taken
        for group in self.request.feed.take(len(self.groups) - len(self.finished)):
            self.groups[self._taken] = group
            self._taken += 1
        added = range(first, self._taken)
        if self.request.settings.rollout.deterministic:
            self.waiting += [
                Call(tuple(added[engine :: self._num_engines]), engine)
                for engine in range(min(self._num_engines, len(added)))
            ]
        else:
            self.waiting += [Call((position,)) for position in added]

    def requests(self, call: Call) -> list[SampleRequest]:
        """What a call asks the engine for: one request per unfinished response."""
        limit = self.request.sampling.max_response_tokens
        return [request for position in call.positions for request in self.groups[position].requests(limit)]

    def ask(self, call: Call, client: EngineClient) -> Coroutine[Any, Any, list[Completion]]:
        """Get the answers to `requests` from an engine, or from the engine and a function."""
        request, requests = self.request, self.requests(call)
        limit = request.settings.rollout.request_timeout_seconds
        call.oldest_version = request.versions().start
        if request.generation is None:
            return client.generate(requests, request.sampling, limit)
        groups = [self.groups[position] for position in call.positions]
        prompts = [group.prompt for group in groups for _ in range(group.num_unfinished)]
        return request.generation.complete(client, prompts, requests, request.sampling, limit)

    def connections(self, call: Call) -> int:
        """HTTP requests that run at the same time for a call."""
        if self.request.generation is None:
            return 1
        return sum(self.groups[position].num_unfinished for position in call.positions)

    def split(self, call: Call, completions: Sequence[Completion]) -> Iterator[tuple[int, list[Completion]]]:
        """The answers to `requests`, by the position of their group."""
        answers = iter(completions)
        for position in call.positions:
            yield position, [next(answers) for _ in range(self.groups[position].num_unfinished)]

    def extend(
        self, position: int, completions: Sequence[Completion], oldest_version: int | None = None
    ) -> UnfinishedGroup:
        """Add an engine's answers to the group at this position; returns the group. Raises StaleWeightsError if a token
        comes from weights older than `oldest_version` (None: the oldest ones now), or unknown ones."""
        group, now = self.groups[position], self.request.versions()
        allowed = range(now.start if oldest_version is None else oldest_version, now.stop)
        for completion in completions:
            versions = {version for version, _ in completion.weight_versions}
            if not all(version in allowed for version in versions) or (completion.response_ids and not versions):
                since = f", and {allowed.start} when it was requested" if len(allowed) > 1 else ""
                raise StaleWeightsError(
                    f"a sample of prompt {group.prompt.index} was generated with weight version {sorted(versions)}, "
                    f"the current one is {allowed[-1]}{since}"
                )
        self.groups[position] = group.extended(completions)
        return self.groups[position]

    def is_answered(self, call: Call) -> bool:
        return all(self.groups[position].is_complete for position in call.positions)

    def finish(self, position: int, group: SampleGroup) -> None:
        """Keep a judged group, or leave it to a feed that grows."""
        self.request.feed.judged(position, group)
        if self.request.feed.wake is None:
            self.finished[position] = group
        else:
            del self.groups[position]

    def put_back(self, call: Call, pause_seconds: float = 0.0) -> None:
        """Queue a call again, before all others, without counting an attempt."""
        call.not_before = time.monotonic() + pause_seconds
        self.waiting.appendleft(call)

    def retry(self, call: Call, error: EngineError) -> None:
        """Queue a failed call again after a pause, for any engine that may take it. Raises EngineError, which names the
        prompts, if that was its last attempt."""
        call.attempts += 1
        if call.attempts >= self.request.settings.rollout.request_attempts:
            prompts = ", ".join(map(str, self.prompt_indices(call)))
            raise EngineError(
                f"{error}\nThat was the last attempt for prompt {prompts} (rollout.request_attempts = "
                f"{call.attempts}); the engine is otherwise healthy"
            )
        self.retries += 1
        call.positions = tuple(p for p in call.positions if not self.groups[p].is_complete)
        self.put_back(call, FIRST_BACK_OFF_SECONDS * 2 ** (call.attempts - 1))
