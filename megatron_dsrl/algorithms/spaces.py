"""Spaces: turn a sampled response into a scored sequence.

Post-train space (standard RL) scores log P(y|x): the sequence is prompt + response. Pre-train space (PreRL, arXiv
2604.14142) scores log P(y): the sequence is BOS + response, without any prompt token, and positions restart at 0
because a scored sequence always starts at position 0. In a response of several turns (`rollout.generate`) only the
prompt is dropped; tool results and the like stay as unscored context (examples/own_generation). The samples are the
same; only what is updated differs. All later code (packing, log-probs, losses) is shared by all spaces.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_dsrl.common.compact import int_array
from megatron_dsrl.config.choices import SPACES
from megatron_dsrl.config.registry import Options

LONGEST_BOS = 3
"""Number of tokens of the longest BOS, `<|im_start|>assistant\\n`. Plans do not read the tokenizer: the counterpart in
Llama 3 has four."""


@dataclass(frozen=True)
class ScoredSequence:
    """Token ids and which of them are scored, each given all tokens before it."""

    token_ids: Sequence[int]
    """Stored as a compact array."""
    num_context: int
    """Number of leading context tokens; at least 1, since a token is scored given those before it."""
    mask: tuple[bool, ...] | None = None
    """[len(token_ids) - num_context] which of the other tokens are scored; None means all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", int_array(self.token_ids))
        assert self.num_context >= 1, "a token is scored given those before it"
        assert self.mask is None or len(self.mask) == len(self.token_ids) - self.num_context

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.num_context if self.mask is None else sum(self.mask)

    @property
    def token_tensor(self) -> Tensor:
        """[len(token_ids)] int64, a copy."""
        return torch.frombuffer(self.token_ids, dtype=torch.int32).long()

    @property
    def scored_positions(self) -> Tensor:
        """[num_scored] int64: positions of the scored tokens in the sequence."""
        if self.mask is None:
            return torch.arange(self.num_context, len(self.token_ids))
        return self.num_context + torch.tensor(self.mask).nonzero().flatten()

    def select_scored(self, values: Tensor) -> Tensor:
        """[num_scored]: select the scored tokens from `values`, which has one value per response token."""
        return values[self.scored_positions - len(self.token_ids) + len(values)]

    def spread_scored(self, values: Sequence[float], num_tokens: int) -> list[float | None]:
        """The reverse of `select_scored`: one entry per response token (`num_tokens` of them), None if unscored."""
        by_position = dict(zip(self.scored_positions.tolist(), values, strict=True))
        return [by_position.get(position) for position in range(len(self.token_ids) - num_tokens, len(self.token_ids))]


class Space(Options):
    """Base class of spaces: fields are options, `context` decides what a response is conditioned on."""

    prompt_in_context: ClassVar[bool]
    """Whether scored tokens are conditioned on the prompt, as in the engine. Only then are their log-probs comparable
    with the engine's, and can be computed with the experts that the engine chose."""

    metrics_prefix: ClassVar[str] = ""
    """Prefix for metrics of scored tokens, such as their entropy, if the prompt is not in the context: these describe a
    distribution other than P(y|x)."""

    @property
    def context_text(self) -> str:
        """Text that replaces the prompt, possibly with special tokens; may be empty."""
        return ""

    def max_context_tokens(self, max_prompt_tokens: int) -> int:
        """Upper bound on the context length, for plans and checks."""
        return max_prompt_tokens

    @abstractmethod
    def context(self, prompt_ids: Sequence[int], context_ids: Sequence[int]) -> Sequence[int]:
        """Token ids that precede the response; `context_ids` are those of `context_text`.

        Raises ValueError if the prompt is empty and the space needs it.
        """

    def sequence(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        context_ids: Sequence[int] = (),
        scored: Sequence[bool] | None = None,
    ) -> ScoredSequence:
        """The scored sequence of a response: its context, then the response.

        Without any context, nothing predicts the first response token, so it is unscored context; a one-token response
        then has nothing to score. Raises ValueError if a part that the space needs is empty.

        Args:
            response_ids: at least one token.
            context_ids: token ids of `context_text`.
            scored: [len(response_ids)] which response tokens are scored; None means all.
        """
        if not response_ids:
            raise ValueError("a scored sequence needs at least one response token")
        context = self.context(prompt_ids, context_ids)
        unscored = 0 if context else 1
        mask = None if scored is None else tuple(scored[unscored:])
        token_ids = int_array(context) + int_array(response_ids)
        return ScoredSequence(token_ids, len(context) + unscored, mask)


@SPACES.register
class PostTrain(Space):
    """Standard RL: update log P(y|x). The scored sequence is prompt + response."""

    name: Literal["post_train"] = "post_train"
    prompt_in_context: ClassVar[bool] = True

    def context(self, prompt_ids: Sequence[int], context_ids: Sequence[int]) -> Sequence[int]:
        if not prompt_ids:
            raise ValueError("the post-train space needs at least one prompt token")
        return prompt_ids


@SPACES.register
class PreTrain(Space):
    """PreRL (arXiv 2604.14142): update log P(y). The scored sequence is BOS + response, without the prompt."""

    name: Literal["pre_train"] = "pre_train"

    bos: Literal["im_start", "none", "assistant"] = "im_start"
    """`im_start`: the token `<|im_start|>`. `none`: no BOS; the first response token is unscored context.
    `assistant`: the tokens of `<|im_start|>assistant\\n`. For tokenizers without `<|im_start|>`, `im_start` is their
    own BOS, and `assistant` is what their chat template puts before a response."""

    prompt_in_context: ClassVar[bool] = False
    metrics_prefix: ClassVar[str] = "pre_train"

    @property
    def context_text(self) -> str:
        return {"im_start": "<|im_start|>", "none": "", "assistant": "<|im_start|>assistant\n"}[self.bos]

    def max_context_tokens(self, max_prompt_tokens: int) -> int:
        return LONGEST_BOS

    def context(self, prompt_ids: Sequence[int], context_ids: Sequence[int]) -> Sequence[int]:
        return context_ids
