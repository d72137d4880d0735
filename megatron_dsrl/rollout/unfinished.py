"""Groups that are being sampled: responses so far, requests still to make, and what a step leaves to the next one.

A response may consist of the answers to several requests: its engine died, or it was carried over to the next step. Its
random numbers depend only on its seed and the token's position, so it continues as it would have without the
interruption, except for the weights.

Asynchronous sampling carries over finished groups, and the prompts and seeds of those in flight. Partial rollouts carry
over responses that were aborted when a step had enough groups: the next step continues them under its own weights
before it begins new prompts, so no step waits for the longest responses. A response then mixes tokens of several weight
versions. `max_weight_versions` bounds their number: a group that would have more is restarted with other random
numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_dsrl.common.compact import float_array, int_array
from megatron_dsrl.common.disk import replacing
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest, VersionSpans
from megatron_dsrl.rollout.recording import as_json_line, group_of_record, prompt_of_record
from megatron_dsrl.rollout.sample import SampleGroup, TurnRewards, count_tokens

CARRY_OVER_FILE = "carried_over.jsonl"


@dataclass(frozen=True)
class PartialResponse:
    """The part of one response that has been sampled so far."""

    seed: int
    response_ids: Sequence[int] = ()
    """Stored as a compact array, like the log-probs."""
    log_probs: Sequence[float] = ()
    """Log-prob of every token, float32, from the engine that produced it. Unit: nats."""
    weight_versions: VersionSpans = ()
    finish_reason: Literal["stop", "length"] | None = None
    """None: still to be continued."""
    routed_experts: str | None = None
    """As in `Sample`, from the last request, which recomputed prompt and earlier tokens: choices made by older weights
    are not kept."""
    scored: tuple[bool, ...] | None = None
    """As in `Sample`. Only a whole response from `rollout.generate` has one: it is never continued."""
    turn_rewards: TurnRewards = ()
    """As in `Sample`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "response_ids", int_array(self.response_ids))
        object.__setattr__(self, "log_probs", float_array(self.log_probs))

    def extended(self, completion: Completion) -> "PartialResponse":
        return PartialResponse(
            seed=self.seed,
            response_ids=int_array(self.response_ids) + int_array(completion.response_ids),
            log_probs=float_array(self.log_probs) + float_array(completion.log_probs),
            weight_versions=merge_spans(self.weight_versions + completion.weight_versions),
            finish_reason=None if completion.finish_reason == "abort" else completion.finish_reason,
            routed_experts=None if completion.finish_reason == "abort" else completion.routed_experts,
            scored=completion.scored,
            turn_rewards=completion.turn_rewards,
        )


@dataclass(frozen=True)
class UnfinishedGroup:
    """A prompt whose responses are being sampled."""

    prompt: Prompt
    responses: tuple[PartialResponse, ...]

    @classmethod
    def new(cls, prompt: Prompt, seeds: Sequence[int]) -> "UnfinishedGroup":
        """A group without any tokens yet; one seed per response."""
        return cls(prompt, tuple(PartialResponse(seed) for seed in seeds))

    @property
    def is_complete(self) -> bool:
        return all(response.finish_reason is not None for response in self.responses)

    @property
    def num_unfinished(self) -> int:
        return sum(response.finish_reason is None for response in self.responses)

    @property
    def num_tokens(self) -> int:
        """Response tokens sampled so far."""
        return sum(sum(one.scored) if one.scored else len(one.response_ids) for one in self.responses)

    @property
    def oldest_version(self) -> int | None:
        """Oldest version of the weights that produced any of its tokens; None without tokens."""
        firsts = (response.weight_versions[0][0] for response in self.responses if response.weight_versions)
        return min(firsts, default=None)

    def requests(self, max_response_tokens: int) -> list[SampleRequest]:
        return [
            SampleRequest(
                token_ids=(*self.prompt.token_ids, *response.response_ids),
                seed=response.seed,
                max_new_tokens=max_response_tokens - len(response.response_ids),
            )
            for response in self.responses
            if response.finish_reason is None
        ]

    def extended(self, completions: Sequence[Completion]) -> "UnfinishedGroup":
        """The group with the answers to `requests`, in the same order."""
        assert len(completions) == self.num_unfinished
        answers = iter(completions)
        return replace(
            self,
            responses=tuple(
                response.extended(next(answers)) if response.finish_reason is None else response
                for response in self.responses
            ),
        )


def merge_spans(spans: VersionSpans) -> VersionSpans:
    """Merge adjacent spans of the same version."""
    return tuple((version, sum(count for _, count in same)) for version, same in groupby(spans, itemgetter(0)))


def new_groups(prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> list[UnfinishedGroup]:
    """A group per prompt that has nothing yet; `seeds` has those of its samples."""
    return [UnfinishedGroup.new(*pair) for pair in zip(prompts, seeds, strict=True)]


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
        """Read it from a checkpoint folder; empty if that does not exist. Raises UserError if the file is missing or
        damaged."""
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
    """The carried-over part of a checkpoint, ready to be written; see `checkpoint.store.WeightsWrite`."""

    carried: CarryOver | None
    """None on ranks other than 0."""
    folder: Path

    def write(self) -> list[Path]:
        """Write the file and return it; nothing to write on ranks other than 0."""
        if self.carried is None:
            return []
        self.carried.write(self.folder / CARRY_OVER_FILE)
        return [self.folder / CARRY_OVER_FILE]

    def finish(self) -> None: ...


def restart_expired(
    carried: CarryOver,
    weight_version: int,
    max_weight_versions: int,
    new_seeds: Callable[[Sequence[Prompt]], Sequence[Sequence[int]]],
) -> tuple[CarryOver, int]:
    """Restart the groups that are too old for the current weights. Returns what this step continues, and the number of
    restarted groups.

    Args:
        weight_version: version of this step's weights.
        max_weight_versions: versions that one group may mix, including this one.
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
