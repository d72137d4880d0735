"""A group on its way: what there is of each response so far, and what must still be asked for.

A response may be put together from several requests: its engine died, or its step had enough groups and the response
was carried over to the next one (partial rollouts). Its random numbers depend on its seed and the position of a token
alone, so it goes on as it would have without the interruption, up to the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.engines.client import Completion, SampleRequest, VersionSpans


@dataclass(frozen=True)
class PartialResponse:
    """What there is of one response."""

    seed: int
    response_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    """Of every token there is, by the engine that produced it. Unit: nat."""
    weight_versions: VersionSpans = ()
    finish_reason: Literal["stop", "length"] | None = None
    """None: it is to be continued."""
    routed_experts: str | None = None
    """As in `Sample`, of the request that ended it: it went through prompt and earlier tokens once more. So what
    older weights chose for those is not kept."""

    def extended(self, completion: Completion) -> "PartialResponse":
        """With what an engine has added."""
        return PartialResponse(
            seed=self.seed,
            response_ids=self.response_ids + completion.response_ids,
            log_probs=self.log_probs + completion.log_probs,
            weight_versions=merge_spans(self.weight_versions + completion.weight_versions),
            finish_reason=None if completion.finish_reason == "abort" else completion.finish_reason,
            routed_experts=None if completion.finish_reason == "abort" else completion.routed_experts,
        )


@dataclass(frozen=True)
class UnfinishedGroup:
    """A prompt whose responses are being sampled."""

    prompt: Prompt
    responses: tuple[PartialResponse, ...]

    @classmethod
    def new(cls, prompt: Prompt, seeds: Sequence[int]) -> "UnfinishedGroup":
        """Nothing is there yet; one seed per response."""
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
        """Response tokens that there are."""
        return sum(len(response.response_ids) for response in self.responses)

    @property
    def oldest_version(self) -> int | None:
        """Of the weights that produced any of its tokens; None when there is none."""
        firsts = (response.weight_versions[0][0] for response in self.responses if response.weight_versions)
        return min(firsts, default=None)

    def requests(self, max_response_tokens: int) -> list[SampleRequest]:
        """What an engine must still do: one request per response that has not ended."""
        return [
            SampleRequest(
                token_ids=self.prompt.token_ids + response.response_ids,
                seed=response.seed,
                max_new_tokens=max_response_tokens - len(response.response_ids),
            )
            for response in self.responses
            if response.finish_reason is None
        ]

    def extended(self, completions: Sequence[Completion]) -> "UnfinishedGroup":
        """With the answers to `requests`, in their order."""
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
    """Neighbouring spans of the same version as one."""
    merged: list[tuple[int, int]] = []
    for version, count in spans:
        if merged and merged[-1][0] == version:
            merged[-1] = (version, merged[-1][1] + count)
        else:
            merged.append((version, count))
    return tuple(merged)
