"""Which fault happens when, derived from a seed."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from tools.fault_soak.fault import Fault, Moment

START_SECONDS = 20.0
PART_SECONDS = 0.5


@dataclass(frozen=True)
class PlannedFault:
    """A fault, and when it happens: a delay after a part of a step has begun."""

    name: str
    step: int
    """From 1; the first step from which on the moment counts."""
    moment: Moment
    delay_seconds: float
    seed: int
    """For choices among its targets."""


def choose_faults(seed: int, steps: int, count: int, kinds: Mapping[str, type[Fault]]) -> list[PlannedFault]:
    """Faults in the order in which they happen; the same ones for the same arguments.

    Kinds take turns in a shuffled order, across seeds too, so that few seeds cover all of them. The last step has none,
    so that the run has something to do after every fault.

    Args:
        seed: of the moments, delays and targets, and where in the order of kinds to begin.
        steps: of the run; at least 2.
        count: number of faults. They happen in different steps if the run has enough.
        kinds: to choose from.
    """
    order = random.Random(0).sample(sorted(kinds), len(kinds))
    names = [order[(seed * count + number) % len(order)] for number in range(count)]
    chance = random.Random(seed)
    chance.shuffle(names)
    candidates = range(1, steps)
    few = count <= len(candidates)
    at = sorted(chance.sample(candidates, count) if few else chance.choices(candidates, k=count))
    return [_planned(name, step, kinds[name], chance) for name, step in zip(names, at)]


def _planned(name: str, step: int, kind: type[Fault], chance: random.Random) -> PlannedFault:
    moment = chance.choice(kind.moments)
    longest = START_SECONDS if moment is Moment.START else PART_SECONDS
    return PlannedFault(name, step, moment, round(chance.uniform(0, longest), 3), chance.randrange(2**32))
