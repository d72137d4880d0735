"""Aggregate token losses into one number.

An aggregation gives each sequence of an optimizer step one weight that all its tokens share; the loss is the sum of
`weight * token loss`. Weights are computed from the *global* batch over all data-parallel ranks, so micro-batching,
packing and data parallelism only sum terms and cannot change the result. Only samples kept by the filter count.
(The authors' released configuration averages per micro-batch; this project deliberately does not.)

| name | loss | source |
|---|---|---|
| `token_mean` | sum of l / number of tokens | DAPO (arXiv 2503.14476), the released DSRL configuration |
| `sequence_mean` | mean over samples of (sum of l / length) | GRPO (arXiv 2402.03300) |
| `token_sum` | sum of l / (number of samples x constant) | Dr.GRPO (arXiv 2503.20783) |

Under `token_mean` and `token_sum` a token weighs the same in long and short responses; under `sequence_mean` it weighs
less in long ones. `token_mean` and `token_sum` differ by a factor that varies with the mean length of a step.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_dsrl.config.choices import AGGREGATIONS
from megatron_dsrl.config.registry import Options


class AggregationOptions(Options):
    """Base class of aggregations: fields are options, `weights` computes."""

    @abstractmethod
    def weights(self, num_scored: Sequence[int], max_response_tokens: int) -> Tensor:
        """Weight of each sequence's tokens, [num_sequences] float32, from the scored tokens of each kept sequence in
        the optimizer step, over all data-parallel ranks."""


@AGGREGATIONS.register
class TokenMean(AggregationOptions):
    """Mean over all tokens (DAPO, arXiv 2503.14476)."""

    name: Literal["token_mean"] = "token_mean"

    def weights(self, num_scored: Sequence[int], max_response_tokens: int) -> Tensor:
        return token_mean_weights(num_scored)


@AGGREGATIONS.register
class SequenceMean(AggregationOptions):
    """Mean over samples of each sample's mean over its tokens (GRPO, arXiv 2402.03300)."""

    name: Literal["sequence_mean"] = "sequence_mean"

    def weights(self, num_scored: Sequence[int], max_response_tokens: int) -> Tensor:
        lengths = torch.tensor(num_scored, dtype=torch.float32)
        return 1.0 / (lengths.clamp(min=1) * max(len(num_scored), 1))


@AGGREGATIONS.register
class TokenSum(AggregationOptions):
    """Mean over samples of each sample's sum over its tokens, divided by a constant (Dr.GRPO, arXiv 2503.20783)."""

    name: Literal["token_sum"] = "token_sum"

    constant: int | None = Field(default=None, ge=1)
    """The divisor, in tokens; null means `rollout.max_response_tokens`."""

    def weights(self, num_scored: Sequence[int], max_response_tokens: int) -> Tensor:
        total = max(len(num_scored), 1) * (self.constant or max_response_tokens)
        return torch.full((len(num_scored),), 1.0 / total, dtype=torch.float32)


def token_mean_weights(num_scored: Sequence[int]) -> Tensor:
    """Weights for the mean over all tokens: 1 / (number of tokens)."""
    total = sum(num_scored)
    return torch.full((len(num_scored),), 1.0 / total if total else 0.0, dtype=torch.float32)
