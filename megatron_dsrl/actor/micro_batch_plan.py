"""Which sequences form which micro-batch on which data-parallel rank. Pure Python.

Invariants:
- every sequence is in exactly one micro-batch;
- all data-parallel ranks get the same number of micro-batches (a short rank gets empty ones), a multiple of what the
  pipeline schedule asks for;
- no micro-batch exceeds the token budget, unless it is one single sequence that does so alone;
- the number of micro-batches is the smallest that the greedy placement finds;
- costs are balanced: where the token budget does not bind, no micro-batch costs more than the mean of all plus the
  costliest sequence (Graham's bound for greedy placement, SIAM J. Appl. Math. 17, 1969); and what two ranks compute
  altogether differs by no more than two micro-batches of one number (the j-th of each) somewhere do;
- the j-th micro-batches of all ranks are alike in cost, since experts are shared between them, and the costliest come
  first, so that a lack of memory shows at once;
- the plan depends on nothing but the arguments, so that every rank computes the same one.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

MicroBatchPlan = list[list[list[int]]]
"""plan[data_parallel_rank][micro_batch] = indices of its sequences."""


@dataclass(frozen=True)
class SequenceCost:
    """Compute of a sequence, in FLOPs of one layer's forward pass: that of all layers and of the backward pass are
    multiples of it. The output layer, which sees scored tokens only, is left out."""

    per_token: float
    """Linear layers."""
    per_token_and_length: float
    """Attention: what every token costs, divided by the sequence's length."""

    @classmethod
    def for_layer(
        cls, hidden_size: int, attention_heads: int, key_value_groups: int, head_dim: int, feed_forward_size: int
    ) -> "SequenceCost":
        """Of a decoder layer with gated feed-forward.

        Args:
            hidden_size: of the model.
            attention_heads: query heads.
            key_value_groups: key/value heads.
            head_dim: size of each.
            feed_forward_size: inner size; of experts that of all that one token goes through.
        """
        attention_size = attention_heads * head_dim
        weights = hidden_size * (2 * attention_size + 2 * key_value_groups * head_dim + 3 * feed_forward_size)
        # Scores and weighted values: 2 FLOPs each per channel and pair; a causal mask leaves half of the pairs.
        return cls(per_token=2.0 * weights, per_token_and_length=2.0 * attention_size)

    def __call__(self, length: int) -> float:
        """Of a sequence of so many tokens."""
        return length * (self.per_token + self.per_token_and_length * length)


def plan_micro_batches(
    lengths: Sequence[int], data_parallel_size: int, max_tokens: int, cost: SequenceCost, multiple_of: int = 1
) -> MicroBatchPlan:
    """Balanced micro-batches within a token budget.

    Args:
        lengths: tokens of each sequence.
        data_parallel_size: number of model replicas.
        max_tokens: token budget of a micro-batch.
        cost: compute of a sequence.
        multiple_of: what the number of each rank's micro-batches is a multiple of: the pipeline-parallel size for the
            interleaved schedule.
    """
    costs = [cost(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    within_budget = sum(min(length, max_tokens) for length in lengths)  # a longer one takes a micro-batch, not several
    fewest = max(1, -(-within_budget // (max_tokens * data_parallel_size)))
    count = -(-fewest // multiple_of) * multiple_of
    while (bins := _place(order, lengths, costs, count * data_parallel_size, max_tokens)) is None:
        count += multiple_of
    return _deal_out(bins, costs, data_parallel_size)


def _place(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[float], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Longest first, each into the cheapest bin that has room (an empty one always has); None where one has none."""
    cheapest_first = [(0.0, b) for b in range(num_bins)]
    tokens = [0] * num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for i in order:
        without_room = []
        while cheapest_first:
            cost, b = heapq.heappop(cheapest_first)
            if not bins[b] or tokens[b] + lengths[i] <= max_tokens:
                break
            without_room.append((cost, b))
        else:
            return None
        bins[b].append(i)
        tokens[b] += lengths[i]
        for entry in [*without_room, (cost + costs[i], b)]:
            heapq.heappush(cheapest_first, entry)
    return bins


def _deal_out(bins: list[list[int]], costs: Sequence[float], data_parallel_size: int) -> MicroBatchPlan:
    """Costliest first, one to each rank in turn; in every turn the rank with the least so far gets the costliest."""
    cost_of = [sum(costs[i] for i in members) for members in bins]
    costliest_first = sorted(range(len(bins)), key=lambda b: (-cost_of[b], b))
    plan: MicroBatchPlan = [[] for _ in range(data_parallel_size)]
    totals = [0.0] * data_parallel_size
    for start in range(0, len(bins), data_parallel_size):
        turn = costliest_first[start : start + data_parallel_size]
        ranks = sorted(range(data_parallel_size), key=lambda rank: (totals[rank], rank))
        for rank, b in zip(ranks, turn, strict=True):
            plan[rank].append(bins[b])
            totals[rank] += cost_of[b]
    return plan
