"""SGLang's `/generate`: requests and answers."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from megatron_dsrl.common.compact import float_array, int_array
from megatron_dsrl.model.routed_experts import encode_routed_experts
from megatron_dsrl.rollout.engines.errors import BadRequestError, EngineError
from megatron_dsrl.rollout.engines.packed_answers import Answer
from megatron_dsrl.rollout.sample import SamplingParameters, TurnRewards

VersionSpans = tuple[tuple[int, int], ...]
"""(weight version, number of tokens that it produced), oldest first."""


@dataclass(frozen=True)
class SampleRequest:
    """A request for one response."""

    token_ids: tuple[int, ...]
    """The prompt and the response tokens so far."""
    seed: int
    """Seed of the response's random numbers, in 0..2^63 - 1."""
    max_new_tokens: int
    """The response ends after at most this many more tokens."""


@dataclass(frozen=True)
class Completion:
    """The engine's result for one request."""

    response_ids: Sequence[int]
    """New tokens, including the stop token. Stored as a compact array, like the log-probs."""
    log_probs: Sequence[float]
    """Log-prob of every new token, float32. Unit: nats."""
    finish_reason: Literal["stop", "length", "abort"]
    """`length`: the response reached the limit. `abort`: `abort_all` ended it, perhaps before its first token."""
    weight_versions: VersionSpans
    """Versions of the weights that produced the tokens; several if weights changed during the request."""
    routed_experts: str | None = None
    """The experts chosen for every token of request and response except the last, which went through no layer. None
    unless requested."""
    scored: tuple[bool, ...] | None = None
    """Which tokens the model wrote, in a response that a function has written with it (`rollout.generate`). None means
    all."""
    turn_rewards: TurnRewards = ()
    """Rewards that the function recorded."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "response_ids", int_array(self.response_ids))
        object.__setattr__(self, "log_probs", float_array(self.log_probs))


def generate_body(requests: Sequence[SampleRequest], sampling: SamplingParameters) -> dict[str, Any]:
    """The JSON body that asks for one response per request."""
    common = {
        "stop_token_ids": list(sampling.stop_token_ids),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }
    return {
        "input_ids": [list(request.token_ids) for request in requests],
        "sampling_params": [
            common | {"max_new_tokens": request.max_new_tokens, "sampling_seed": request.seed} for request in requests
        ],
        "return_logprob": True,
        "return_routed_experts": sampling.return_routed_experts,
    }


def read_completions(
    answers: Sequence[Answer], requests: Sequence[SampleRequest], sampling: SamplingParameters
) -> list[Completion]:
    """The answer to `generate_body` as one completion per request.

    Raises:
        EngineError: the answer is unusable, or a log-prob is not a finite number.
        BadRequestError: the experts were asked for, and the engine does not return them.
    """
    if len(answers) != len(requests):
        raise EngineError(f"/generate answered with {len(answers)} samples to {len(requests)} requests")
    completions = [_completion(answer) for answer in answers]
    if not sampling.return_routed_experts:
        return completions
    return [
        replace(completion, routed_experts=_routed_experts(request, completion, answer))
        for request, completion, answer in zip(requests, completions, answers)
    ]


def _completion(answer: Answer) -> Completion:
    """One response of `/generate`, without its experts."""
    reason = answer.meta.get("finish_reason")
    if not isinstance(reason, dict) or reason.get("type") not in ("stop", "length", "abort"):
        raise EngineError(f"it ended a sample with {reason!r:.500}")
    if len(answer.log_probs) != len(answer.response_ids):
        raise EngineError(f"it returned {len(answer.log_probs)} log-probs for {len(answer.response_ids)} tokens")
    finite = np.isfinite(np.asarray(answer.log_probs))
    if not finite.all():
        position = int(finite.argmin())
        raise EngineError(
            f"the log-prob of token {position} of a response is {answer.log_probs[position]}, not a finite number, so "
            "its logits are not either: the weights have diverged, or the model overflows in model.dtype or with the "
            "engine's kernels (engine.extra_arguments)"
        )
    return Completion(
        response_ids=answer.response_ids,
        log_probs=answer.log_probs,
        finish_reason=reason["type"],
        weight_versions=tuple(
            (int(span["version"]), span["end"] - span["start"])
            for span in answer.meta.get("weight_versions", ())
            if span["end"] > span["start"]
        ),
    )


def _routed_experts(request: SampleRequest, completion: Completion, answer: Answer) -> str | None:
    if not completion.response_ids:
        return None
    answered = answer.meta.get("routed_experts")
    if answered is None:
        raise BadRequestError(
            "it does not return the experts it chose, which rollout.routing_replay needs; start it with "
            "--enable-return-routed-experts, or turn routing_replay off"
        )
    experts = np.frombuffer(base64.b64decode(answered), dtype=np.int32)
    tokens = len(request.token_ids) + len(completion.response_ids) - 1
    if not experts.size or experts.size % tokens:
        raise EngineError(f"it returned {experts.size} expert choices for {tokens} tokens")
    return encode_routed_experts(experts)
