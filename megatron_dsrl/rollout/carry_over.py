"""State that a step passes to the next one.

Asynchronous sampling (`group_queue.py`): finished groups, and the prompts and seeds of those in flight.

Partial rollouts: responses aborted when a step has enough groups (`sample_until.py`) keep their tokens, and the next
step continues them under its own weights before it begins new prompts. So no step waits for the longest responses.

A response then mixes tokens of several weight versions. `max_weight_versions` bounds their number: a group that would
have more is restarted with other random numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_dsrl.common.disk import replacing
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.recording import as_json_line, group_of_record, prompt_of_record
from megatron_dsrl.rollout.sample import SampleGroup, count_tokens
from megatron_dsrl.rollout.unfinished import PartialResponse, UnfinishedGroup, new_groups

CARRY_OVER_FILE = "carried_over.jsonl"


@dataclass(frozen=True)
class CarryOver:
    """Groups that were sampled, fully or in part, but not trained on yet."""

    finished: tuple[SampleGroup, ...] = ()
    """Judged groups: more than their step needed, or of steps to come."""
    unfinished: tuple[UnfinishedGroup, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Response tokens sampled so far, which will not be sampled again."""
        return count_tokens(self.finished) + sum(group.num_tokens for group in self.unfinished)

    def write(self, file: Path) -> None:
        """One JSON line per group, flushed to disk."""
        with replacing(file) as stream:
            for kind, groups in (("finished", self.finished), ("unfinished", self.unfinished)):
                for group in groups:
                    stream.write(as_json_line({"kind": kind, "group": group}))

    @classmethod
    def read_from(cls, folder: Path) -> "CarryOver":
        """Read it from a checkpoint folder; empty if the folder does not exist.

        Raises:
            UserError: the file is missing or damaged.
        """
        if not folder.exists():
            return cls()
        file = folder / CARRY_OVER_FILE
        finished, unfinished = [], []
        try:
            for line in file.read_bytes().splitlines():
                record = orjson.loads(line)
                if record["kind"] == "finished":
                    finished.append(group_of_record(record["group"]))
                else:
                    unfinished.append(_unfinished_group(record["group"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: damaged, the carried-over groups cannot be read ({error!r})") from error
        return cls(tuple(finished), tuple(unfinished))


@dataclass(frozen=True)
class CarryOverWrite:
    """The carried-over part of a checkpoint, ready to be written; see `checkpoint.save.WeightsWrite`."""

    carried: CarryOver | None
    """None on ranks other than 0."""
    folder: Path

    def write(self) -> list[Path]:
        """Write the file and return it; nothing to write on ranks other than 0."""
        if self.carried is None:
            return []
        self.carried.write(self.folder / CARRY_OVER_FILE)
        return [self.folder / CARRY_OVER_FILE]

    def finish(self) -> None:
        """Nothing more to write."""


def restart_expired(
    carried: CarryOver,
    weight_version: int,
    max_weight_versions: int,
    new_seeds: Callable[[Sequence[Prompt]], Sequence[Sequence[int]]],
) -> tuple[CarryOver, int]:
    """Restart the groups that are too old for the current weights.

    Args:
        carried: what the previous step left.
        weight_version: version of this step's weights.
        max_weight_versions: versions that one group may mix, including this one.
        new_seeds: seeds for the restarted groups, one sequence per prompt.

    Returns:
        What this step continues, and the number of restarted groups.
    """
    oldest_allowed = weight_version - max_weight_versions + 1
    finished = tuple(group for group in carried.finished if group.oldest_version >= oldest_allowed)
    expired = [group.prompt for group in carried.finished if group.oldest_version < oldest_allowed]
    unfinished = []
    for group in carried.unfinished:
        if group.oldest_version is not None and group.oldest_version < oldest_allowed:
            expired.append(group.prompt)
        else:
            unfinished.append(group)
    restarted = new_groups(expired, new_seeds(expired))
    return CarryOver(finished, (*unfinished, *restarted)), len(expired)


def _unfinished_group(record: dict[str, Any]) -> UnfinishedGroup:
    responses = []
    for response in record["responses"]:
        pairs = {name: tuple(map(tuple, response[name])) for name in ("weight_versions", "turn_rewards")}
        responses.append(PartialResponse(**response | pairs))
    return UnfinishedGroup(prompt_of_record(record["prompt"]), tuple(responses))
