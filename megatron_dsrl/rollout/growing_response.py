"""A response that a function writes together with the model: turns of the model, and tokens from elsewhere.

The model continues the text so far, so each of its tokens is drawn given the prompt and all tokens before it, just as
the trainer scores it. Tokens from elsewhere are context for those after them and are not scored.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rewards.score import LARGEST_REWARD
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.generation import Completion, SampleRequest, VersionSpans
from megatron_dsrl.rollout.sample import SamplingParameters
from megatron_dsrl.rollout.seeds import turn_seed
from megatron_dsrl.rollout.unfinished import merge_spans

Encode = Callable[[str], Sequence[int]]
"""Text to token ids. Special tokens in the text are recognised, and none are added."""
Decode = Callable[[Sequence[int]], str]
"""Token ids to text without special tokens."""


@dataclass(frozen=True)
class Turn:
    """What the model has written in one go."""

    token_ids: tuple[int, ...]
    """Its tokens, including the stop token if there is one."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the last token is a stop token. `length`: the limit of the turn or of the response was reached."""


class AbortedError(Exception):
    """The engine ended a turn prematurely; the sample starts again."""


class GrowingResponse:
    """One response while it is being written."""

    def __init__(
        self,
        prompt: Prompt,
        seed: int,
        client: EngineClient,
        sampling: SamplingParameters,
        encode: Encode,
        decode: Decode,
        turn_timeout_seconds: float | None = None,
    ) -> None:
        """
        Args:
            seed: the sample's; every turn derives its own from it.
            sampling: `max_response_tokens` limits the model's and all other tokens together.
            turn_timeout_seconds: limit of each turn; None: no limit.
        """
        self.prompt = prompt
        self.sampling = sampling
        self.encode = encode
        self.decode = decode
        self.is_truncated = False
        """Whether the response counts as cut off. Set when the length limit is reached; a function may set it too."""
        self.failure: Exception | None = None
        """Why the engine did not write a turn. The sample has then failed, even if the function catches the error."""
        self._seed = seed
        self._client = client
        self._turn_timeout_seconds = turn_timeout_seconds
        self._turns = 0
        self._limit = sampling.max_response_tokens
        """Tokens of a full response; fewer once an insertion did not fit."""
        self._token_ids: tuple[int, ...] = ()
        self._log_probs: tuple[float, ...] = ()
        self._versions: tuple[int | None, ...] = ()
        """Version of the weights that drew each token; None for tokens from elsewhere."""
        self._turn_rewards: tuple[tuple[int, float], ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The response so far."""
        return self._token_ids

    @property
    def text(self) -> str:
        """The response so far, without special tokens: what the verifier will see."""
        return self.decode(self._token_ids)

    @property
    def remaining_tokens(self) -> int:
        """Number of tokens that still fit into the response."""
        return self._limit - len(self._token_ids)

    async def sample(self, max_new_tokens: int | None = None, stop_token_ids: Sequence[int] = ()) -> Turn:
        """Have the model continue the response.

        Args:
            max_new_tokens: limit of this turn; None: only the response's limit.
            stop_token_ids: tokens that end the turn, besides those that end every response.

        Returns:
            The turn; without any token and with `length` if the response is full.

        Raises:
            EngineError: the engine failed. The sample is then repeated elsewhere; do not catch this.
            ValueError: the response was changed while the model was writing.
        """
        limit = min(self.remaining_tokens, self.remaining_tokens if max_new_tokens is None else max_new_tokens)
        if limit <= 0:
            self.is_truncated |= self.remaining_tokens <= 0
            return Turn((), "length")
        before = self._token_ids
        request = SampleRequest(self.prompt.token_ids + before, turn_seed(self._seed, self._turns), limit)
        self._turns += 1
        completion = await self._ask(request, stop_token_ids)
        if self._token_ids != before:
            raise ValueError("the response was changed while the model was writing; await one turn before the next")
        versions = [version for version, count in completion.weight_versions for _ in range(count)]
        self._add(completion.response_ids, completion.log_probs, versions)
        stopped = completion.finish_reason == "stop"
        self.is_truncated |= not stopped and self.remaining_tokens <= 0
        return Turn(tuple(completion.response_ids), "stop" if stopped else "length")

    def insert(self, tokens: str | Sequence[int]) -> bool:
        """Append tokens that are not the model's, such as a tool's result or a turn of the environment.

        They are appended whole or not at all. If they do not fit, the response is full and counts as truncated.
        In text, special tokens are recognised; see `plain_tokens`. Returns whether they fit.
        """
        ids = tuple(self.encode(tokens) if isinstance(tokens, str) else tokens)
        if len(ids) > self.remaining_tokens:
            self.is_truncated, self._limit = True, len(self._token_ids)
            return False
        self._add(ids, (0.0,) * len(ids), [None] * len(ids))
        return True

    def plain_tokens(self, text: str) -> tuple[int, ...]:
        """Tokens of text from elsewhere, without special ones, which could end the model's turn or open another."""
        return tuple(token for token in self.encode(text) if self.decode([token]))

    def reward(self, value: float) -> None:
        """Record a reward for what has been written so far, such as a turn. The verifier's reward is added to the sum.

        Raises ValueError if it is not a finite number of the size of a float32.
        """
        if not math.isfinite(value) or abs(value) > LARGEST_REWARD:
            raise ValueError(f"a reward must be a finite number, not {value!r}")
        self._turn_rewards += ((len(self._token_ids), float(value)),)

    def keep(self, count: int) -> None:
        """Drop all but the first `count` tokens of the response, and rewards recorded after more tokens.

        What is dropped must be decided by what is kept (cut after the first complete tool call). If it depends on what
        is dropped (cut what looks wrong), the kept tokens no longer follow the policy's distribution.
        """
        if count < len(self._token_ids):
            self.is_truncated, self._limit = False, self.sampling.max_response_tokens
        self._token_ids, self._log_probs = self._token_ids[:count], self._log_probs[:count]
        self._versions = self._versions[:count]
        self._turn_rewards = tuple(each for each in self._turn_rewards if each[0] <= count)

    def as_completion(self) -> Completion:
        """The finished response in the form of an engine's answer. Raises ValueError if no token is the model's."""
        scored = tuple(version is not None for version in self._versions)
        if not any(scored):
            raise ValueError("none of the response's tokens are the model's; nothing can be trained on")
        return Completion(
            response_ids=self._token_ids,
            log_probs=self._log_probs,
            finish_reason="length" if self.is_truncated else "stop",
            weight_versions=self._version_spans(),
            scored=None if all(scored) else scored,
            turn_rewards=self._turn_rewards,
        )

    async def _ask(self, request: SampleRequest, stop_token_ids: Sequence[int]) -> Completion:
        """One turn from the engine. An error is kept as `failure`."""
        stops = tuple(dict.fromkeys((*self.sampling.stop_token_ids, *stop_token_ids)))
        sampling = replace(self.sampling, stop_token_ids=stops)
        try:
            (completion,) = await self._client.generate([request], sampling, self._turn_timeout_seconds)
            if completion.finish_reason == "abort":
                raise AbortedError("the engine aborted a turn")
        except Exception as error:
            self.failure = error
            raise
        return completion

    def _version_spans(self) -> VersionSpans:
        """The weights of all tokens. Tokens from elsewhere count with those that drew the next token, which have read
        them, and at the end with the last ones."""
        spans: list[tuple[int, int]] = []
        unread = 0
        for version in self._versions:
            unread += 1
            if version is not None:
                spans.append((version, unread))
                unread = 0
        spans.append((spans[-1][0], unread))
        return merge_spans(tuple(spans))

    def _add(self, ids: Sequence[int], log_probs: Sequence[float], versions: Sequence[int | None]) -> None:
        self._token_ids += tuple(ids)
        self._log_probs += tuple(log_probs)
        self._versions += tuple(versions)
