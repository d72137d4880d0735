"""SGLang's `/generate`: what is asked, and what the answer means."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from megatron_dsrl.model.routed_experts import encode_routed_experts
from megatron_dsrl.rollout.engines.errors import BadRequestError, EngineError
from megatron_dsrl.rollout.sample import SamplingParameters

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
    """The response ends after at most this many further tokens."""


@dataclass(frozen=True)
class Completion:
    """The engine's result for one request."""

    response_ids: tuple[int, ...]
    """New tokens, including the stop token."""

    log_probs: tuple[float, ...]
    """Log-prob of every new token. Unit: nat."""

    finish_reason: Literal["stop", "length", "abort"]
    """`length`: the response reached the limit. `abort`: `abort_all` ended it, perhaps before its first token."""

    weight_versions: VersionSpans
    """Versions of the weights that produced the tokens; several if weights changed during the request."""

    routed_experts: str | None = None
    """The experts chosen for every token of request and response except the last, which went through no layer. None
    unless requested."""


def generate_body(requests: Sequence[SampleRequest], sampling: SamplingParameters) -> dict[str, Any]:
    """The JSON body that asks for one response per request."""
    return {
        "input_ids": [list(request.token_ids) for request in requests],
        "sampling_params": [
            sampling.as_engine_request(request.max_new_tokens) | {"sampling_seed": request.seed}
            for request in requests
        ],
        "return_logprob": True,
        "return_routed_experts": sampling.return_routed_experts,
    }


def read_completions(
    answers: Any, requests: Sequence[SampleRequest], sampling: SamplingParameters
) -> list[Completion]:
    """The decoded JSON answer to `generate_body` as one completion per request.

    Raises:
        EngineError: the answer is unusable, or a log-prob is not a finite number.
        BadRequestError: the experts were asked for, and the engine does not return them.
    """
    if not isinstance(answers, list) or len(answers) != len(requests):
        raise EngineError(f"/generate did not answer with {len(requests)} samples: {answers!r:.500}")
    completions = [read_completion(answer) for answer in answers]
    if not sampling.return_routed_experts:
        return completions
    return [
        replace(completion, routed_experts=_routed_experts(request, completion, answer))
        for request, completion, answer in zip(requests, completions, answers)
    ]


def read_completion(answer: dict[str, Any]) -> Completion:
    """One response of `/generate`, without its experts.

    Raises:
        EngineError: it ended in an unknown way, or a log-prob is not a finite number.
    """
    meta = answer["meta_info"]
    reason = meta["finish_reason"]
    if reason["type"] not in ("stop", "length", "abort"):
        raise EngineError(f"it ended a sample with {reason!r:.500}")
    response_ids = tuple(answer["output_ids"])
    log_probs = tuple(entry[0] for entry in meta.get("output_token_logprobs", ()))  # absent if it never began
    assert len(log_probs) == len(response_ids), f"{len(log_probs)} log-probs for {len(response_ids)} tokens"
    for position, log_prob in enumerate(log_probs):
        if log_prob is None or not math.isfinite(log_prob):  # JSON has no NaN: SGLang writes null
            raise EngineError(
                f"the log-prob of token {position} of a response is {log_prob}, not a finite number, so its logits "
                "are not either: the weights have diverged, or the model overflows in model.dtype or with the "
                "engine's kernels (engine.extra_arguments)"
            )
    return Completion(
        response_ids=response_ids,
        log_probs=log_probs,
        finish_reason=reason["type"],
        weight_versions=tuple(
            (int(span["version"]), span["end"] - span["start"])
            for span in meta.get("weight_versions", ())
            if span["end"] > span["start"]
        ),
    )


def _routed_experts(request: SampleRequest, completion: Completion, answer: dict[str, Any]) -> str | None:
    if not completion.response_ids:
        return None
    answered = answer["meta_info"].get("routed_experts")
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
