"""A group that is being sampled: its responses so far, and the requests still to make.

A response may consist of the answers to several requests: its engine died, or its step had enough groups and it was
carried over to the next one (partial rollouts). Its random numbers depend only on its seed and the token's position,
so it continues as it would have without the interruption, except for the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_dsrl.common.compact import float_array, int_array
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest, VersionSpans
from megatron_dsrl.rollout.sample import TurnRewards


@dataclass(frozen=True)
class PartialResponse:
    """The part of one response that has been sampled so far."""

    seed: int
    response_ids: Sequence[int] = ()
    """Stored as a compact array, like the log-probs."""
    log_probs: Sequence[float] = ()
    """Log-prob of every token, float32, from the engine that produced it. Unit: nat."""
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
        """The response with the tokens of one more request."""
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
        """Whether every response has ended."""
        return all(response.finish_reason is not None for response in self.responses)

    @property
    def num_unfinished(self) -> int:
        """Responses that have not ended."""
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
        """One request per response that has not ended."""
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
    merged: list[tuple[int, int]] = []
    for version, count in spans:
        if merged and merged[-1][0] == version:
            merged[-1] = (version, merged[-1][1] + count)
        else:
            merged.append((version, count))
    return tuple(merged)


def new_groups(prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> list[UnfinishedGroup]:
    """A group per prompt that has nothing yet; `seeds` has those of its samples."""
    return [UnfinishedGroup.new(*pair) for pair in zip(prompts, seeds, strict=True)]
