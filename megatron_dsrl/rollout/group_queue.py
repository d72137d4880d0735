"""The groups of asynchronous sampling: those that wait for an engine, those in flight, and those that are finished.

Groups are trained on in the order in which they began, as many per step as the step takes. The trainer opens only so
many places that a group begun with weights of version v is among the first `1 + max_staleness` steps' worth from then
on, so it is trained on no later than step v + max_staleness (the weights of version v are those that step v updates).
No group is ever too old, and none is dropped for its age. Because they keep the order in which they began, short
responses do not overtake long ones.

The trainer's thread adds groups and takes finished ones; the thread of the engines' batch uses it as its `Feed`.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from megatron_dsrl.rollout.batch import Wake
from megatron_dsrl.rollout.sample import SampleGroup
from megatron_dsrl.rollout.unfinished import CarryOver, UnfinishedGroup


@dataclass(eq=False)
class Place:
    """A group in the queue."""

    group: UnfinishedGroup | None
    """As it began, without tokens; None if it was finished before this process started."""
    result: SampleGroup | None = None
    """Once it is judged."""


class GroupQueue:
    """A `Feed` that grows. All methods may be called from any thread."""

    def __init__(self, accept: Callable[[SampleGroup], bool]) -> None:
        """`accept` says whether a judged group is to be trained on; the others leave the queue."""
        self.wake = Wake()
        self._accept = accept
        self._changed = threading.Condition()
        self._waiting: deque[UnfinishedGroup] = deque()
        """Not begun yet."""
        self._places: deque[Place] = deque()
        """Begun, in that order."""
        self._limit = 0
        """Number of places."""
        self._sampled: dict[int, Place] = {}
        """Being sampled or judged by the running batch, by position."""
        self._next_position = 0
        self._again: list[Place] = []
        """In flight when a batch ended; the next one begins with them."""
        self._rejected: list[Place] = []
        self._new: list[UnfinishedGroup] = []
        """Added since the last `take_step`."""
        self._closed = False
        self.changes = 0
        """Counts what `wait` waits for."""

    # ---- the engines' side: `Feed`

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        """As many groups as there are free places."""
        with self._changed:
            places, self._again = self._again, []
            while self._waiting and len(self._places) < self._limit:
                place = Place(self._waiting.popleft())
                self._places.append(place)
                places.append(place)
            for place in places:
                self._sampled[self._next_position] = place
                self._next_position += 1
            return [place.group for place in places if place.group is not None]

    def judged(self, position: int, group: SampleGroup) -> None:
        """Keep the group at its place, or give the place away if it is not accepted."""
        with self._changed:
            place = self._sampled.pop(position)
            place.result = group
            if not self._accept(group):
                self._places.remove(place)
                self._rejected.append(place)
        self.notify()

    def is_enough(self) -> bool:
        return self._closed

    # ---- the trainer's side

    def add(self, groups: Sequence[UnfinishedGroup]) -> None:
        with self._changed:
            self._waiting += groups
            self._new += groups
        self.wake.set()

    def restore(self, finished: Sequence[SampleGroup], unfinished: Sequence[UnfinishedGroup]) -> None:
        """Begin with the groups of a checkpoint; unfinished ones are sampled from their first token."""
        with self._changed:
            for group in finished:
                (self._places if self._accept(group) else self._rejected).append(Place(None, group))
            self._waiting.extend(unfinished)
        self.wake.set()

    def open(self, places: int) -> None:
        """Set the number of groups that may be in flight or finished."""
        with self._changed:
            self._limit = places
        self.wake.set()

    def begin_again(self) -> None:
        """Have the next batch sample what is in flight, because the last one has ended."""
        with self._changed:
            self._sampled, self._next_position = {}, 0
            self._again = [place for place in self._places if place.result is None]

    def finished_of_next(self, wanted: int) -> int:
        """How many of the groups that the next step takes are finished."""
        with self._changed:
            return sum(place.result is not None for place in islice(self._places, wanted))

    def wait(self, changes: int, seconds: float) -> None:
        """Wait until another group has been judged since `changes` was read, at most this long."""
        with self._changed:
            self._changed.wait_for(lambda: self.changes != changes, seconds)

    def notify(self) -> None:
        """End a `wait`."""
        with self._changed:
            self.changes += 1
            self._changed.notify_all()

    def next_step(self, wanted: int) -> tuple[list[SampleGroup], list[SampleGroup]]:
        """The groups that the next step takes, and those that were not accepted since the last one."""
        with self._changed:
            return _results(islice(self._places, wanted)), _results(self._rejected)

    def take_step(self, groups: int, rejected: int, wanted: int) -> None:
        """Remove what `next_step` has returned: the first `groups`, and the first `rejected` of those not accepted. The
        places of the `wanted` groups stay closed until `open`."""
        with self._changed:
            for _ in range(groups):
                self._places.popleft()
            del self._rejected[:rejected]
            self._limit -= wanted
            self._new.clear()

    def close(self) -> None:
        self._closed = True
        self.wake.set()

    @property
    def unfinished(self) -> list[UnfinishedGroup]:
        """Groups in flight, and those not begun yet."""
        with self._changed:
            begun = [place.group for place in self._places if place.result is None and place.group is not None]
            return [*begun, *self._waiting]

    @property
    def size(self) -> int:
        with self._changed:
            return len(self._places) + len(self._waiting)

    @property
    def num_finished(self) -> int:
        with self._changed:
            return sum(place.result is not None for place in self._places)

    @property
    def left(self) -> CarryOver:
        """What is in the queue or was not accepted, without what was added since the last `take_step`."""
        with self._changed:
            new = set(map(id, self._new))
            older = (place for place in [*self._places, *self._rejected] if id(place.group) not in new)
            unfinished = tuple(group for group in self.unfinished if id(group) not in new)
            return CarryOver(tuple(_results(older)), unfinished)


def _results(places: Iterable[Place]) -> list[SampleGroup]:
    return [place.result for place in places if place.result is not None]
