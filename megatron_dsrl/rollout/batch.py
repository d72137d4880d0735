"""A batch of prompts that is being sampled. It survives lost engines: only unfinished responses are requested again."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_dsrl.rollout.progress import OnSamples
from megatron_dsrl.rollout.sample import SampleGroup, SamplingParameters
from megatron_dsrl.rollout.unfinished import UnfinishedGroup


class Feed(Protocol):
    """Source of a batch's groups; decides when there are enough."""

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        """Groups to begin or to continue, given the number of groups in flight."""

    def judged(self, group: SampleGroup) -> None:
        """Called with every group that is finished."""

    def is_enough(self) -> bool:
        """Whether the groups still in flight should be aborted."""


class WholeFeed:
    """Gives all groups at once and needs all of them."""

    def __init__(self, groups: Sequence[UnfinishedGroup]) -> None:
        self._groups = list(groups)

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        groups, self._groups = self._groups, []
        return groups

    def judged(self, group: SampleGroup) -> None:
        pass

    def is_enough(self) -> bool:
        return False


class BatchSampler(Protocol):
    """What samples a batch: `EngineRollout`."""

    @property
    def weight_version(self) -> int:
        """Version of the engines' current weights."""

    @property
    def training_sampling(self) -> SamplingParameters:
        """Sampling parameters of training."""

    def sample_batch(self, feed: Feed, sampling: SamplingParameters, on_samples: OnSamples) -> "RolloutBatch":
        """Sample and judge the feed's groups until it has enough, with the run's verifier."""


@dataclass(frozen=True)
class BatchRequest:
    """How a batch is sampled."""

    feed: Feed
    sampling: SamplingParameters
    weight_version: int
    """The version that every new token must carry."""
    deterministic: bool
    """Group i goes to engine i modulo the number of engines, and each engine gets all its groups in one call."""
    max_outstanding_samples: int
    """Samples that one engine holds at a time; further prompts wait for the engine that frees up first. No effect on
    deterministic batches."""
    timeout_seconds: float
    """Limit for the whole batch, verification included."""
    call_timeout_seconds: float | None
    """Limit for one call to an engine; None: no limit."""
    call_attempts: int
    """How often a call to a healthy engine is attempted before its failure is an error."""
    health_check_seconds: float
    """Time between two health checks of an engine."""
    health_timeout_seconds: float
    """An engine that has passed no check for this long counts as lost."""


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


class RolloutBatch:
    """The groups of a batch. A group's position is its place in the order in which the feed gave them."""

    def __init__(self, request: BatchRequest, num_engines: int) -> None:
        self.request = request
        self.groups: list[UnfinishedGroup] = []
        self.finished: dict[int, SampleGroup] = {}
        """Judged groups by position."""
        self.waiting: deque[Call] = deque()
        """Calls to make; failed ones come first."""
        self.deadline = time.monotonic() + request.timeout_seconds
        self.retries = 0
        self._num_engines = num_engines

    @property
    def finished_groups(self) -> list[SampleGroup]:
        """Judged groups, by position."""
        return [self.finished[position] for position in sorted(self.finished)]

    @property
    def unfinished_groups(self) -> list[UnfinishedGroup]:
        """Groups that are not judged yet, by position."""
        return [group for position, group in enumerate(self.groups) if position not in self.finished]

    def top_up(self) -> None:
        """Take more groups from the feed."""
        first = len(self.groups)
        self.groups += self.request.feed.take(first - len(self.finished))
        added = range(first, len(self.groups))
        if self.request.deterministic:
            self.waiting += [
                Call(tuple(added[engine :: self._num_engines]), engine)
                for engine in range(min(self._num_engines, len(added)))
            ]
        else:
            self.waiting += [Call((position,)) for position in added]
