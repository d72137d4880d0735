"""Events of torch.profiler for the trace of a run, on the clock of its timeline.

The profiler numbers processes by the system's ids and GPUs by their index, which may be those of ranks. Here they are
separate processes, named after the rank. Ids of flows (from a call to its kernel) get the rank and step in front,
because every profile counts its own.

Source of the format: `baseTimeNanoseconds` is a moment since 1970; a time of an event is in microseconds after it
(libkineto/src/output_json.cpp).
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.profile_files import ProfileFile

FIRST_PROFILE = 2_000_000
PROCESSES_OF_A_RANK = 1000
"""Numbers in the trace that each rank has for the processes of its profiles."""

Event = dict[str, Any]


def profile_events(profile: ProfileFile, origin: float) -> Iterator[Event]:
    """
    Args:
        profile: one rank's profile of one step.
        origin: the moment 0 of the trace, in seconds since 1970.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with gzip.open(profile.path, "rt", encoding="utf-8") as file:
            trace = json.load(file)
        base, events = trace["baseTimeNanoseconds"], trace["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise UserError(f"{profile.path} is damaged ({error}); remove it to see the rest of the trace") from error
    shift = base / 1e3 - origin * 1e6
    numbers: dict[Any, int] = {}
    for event in events:
        number = numbers.setdefault(event["pid"], len(numbers))
        moved = event | {"pid": FIRST_PROFILE + PROCESSES_OF_A_RANK * profile.rank + number}
        if event["ph"] == "M":
            yield _renamed(moved, profile.rank)
            continue
        moved["ts"] = round(event["ts"] + shift, 3)
        if "id" in event:
            moved["id"] = f"{profile.rank}.{profile.step}.{event['id']}"
        yield moved


def _renamed(event: Event, rank: int) -> Event:
    """A process says which rank's it is."""
    if event["name"] == "process_name":
        return event | {"args": {"name": f"rank {rank}, profile: {event['args']['name']}"}}
    return event
