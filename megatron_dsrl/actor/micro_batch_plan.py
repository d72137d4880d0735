"""Assign sequences to micro-batches and data-parallel ranks. Pure Python.

Invariants:
- every sequence is in exactly one micro-batch;
- all data-parallel ranks get the same number of micro-batches (possibly empty ones), a multiple of what the pipeline
  schedule requires;
- no micro-batch exceeds the token budget, unless it is a single sequence longer than the budget;
- the number of micro-batches is the smallest that the greedy placement finds;
- costs are balanced: where the token budget does not bind, no micro-batch costs more than the mean plus the costliest
  sequence (Graham's bound for greedy placement, SIAM J. Appl. Math. 17, 1969), and the total costs of two ranks differ
  by no more than the largest difference between their j-th micro-batches;
- the j-th micro-batches of all ranks have similar costs, since ranks share experts, and the costliest come first, so
  that running out of memory shows at once;
- the plan depends only on the arguments, so every rank computes the same one.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

MicroBatchPlan = list[list[list[int]]]
"""plan[data_parallel_rank][micro_batch] = indices of the sequences in it."""


@dataclass(frozen=True)
class SequenceCost:
    """Compute cost of a sequence in FLOPs of one layer's forward pass; all layers and the backward pass are multiples
    of it. The output layer, which only processes scored tokens, is ignored."""

    per_token: float
    """FLOPs per token in linear layers."""
    per_token_and_length: float
    """FLOPs per token in attention, divided by the sequence length."""

    @classmethod
    def for_layer(
        cls, hidden_size: int, attention_heads: int, key_value_groups: int, head_dim: int, feed_forward_size: int
    ) -> "SequenceCost":
        """Cost in a decoder layer with a gated feed-forward. With experts `feed_forward_size` is the sum over those
        that one token is routed to."""
        attention_size = attention_heads * head_dim
        weights = hidden_size * (2 * attention_size + 2 * key_value_groups * head_dim + 3 * feed_forward_size)
        # Scores and weighted values: 2 FLOPs each per channel and pair; the causal mask leaves half of the pairs.
        return cls(per_token=2.0 * weights, per_token_and_length=2.0 * attention_size)

    def __call__(self, length: int) -> float:
        return length * (self.per_token + self.per_token_and_length * length)


def plan_micro_batches(
    lengths: Sequence[int], data_parallel_size: int, max_tokens: int, cost: SequenceCost, multiple_of: int = 1
) -> MicroBatchPlan:
    """Plan balanced micro-batches of at most `max_tokens` for sequences of these lengths. The number of micro-batches
    per rank is a multiple of `multiple_of`: the pipeline-parallel size for the interleaved schedule, else 1."""
    costs = [cost(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    # A sequence longer than the budget takes one micro-batch, not several.
    within_budget = sum(min(length, max_tokens) for length in lengths)
    fewest = max(1, -(-within_budget // (max_tokens * data_parallel_size)))
    count = -(-fewest // multiple_of) * multiple_of
    while (bins := _place(order, lengths, costs, count * data_parallel_size, max_tokens)) is None:
        count += multiple_of
    return _deal_out(bins, costs, data_parallel_size)


def _place(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[float], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Put each sequence, longest first, into the cheapest bin with room (an empty bin always has room); None if one
    does not fit anywhere."""
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
    """Deal bins out in rounds, costliest first, one per rank; in each round the rank with the lowest total so far gets
    the costliest."""
    bin_costs = [sum(costs[i] for i in members) for members in bins]
    costliest_first = sorted(range(len(bins)), key=lambda b: (-bin_costs[b], b))
    plan: MicroBatchPlan = [[] for _ in range(data_parallel_size)]
    totals = [0.0] * data_parallel_size
    for start in range(0, len(bins), data_parallel_size):
        round_bins = costliest_first[start : start + data_parallel_size]
        ranks = sorted(range(data_parallel_size), key=lambda rank: (totals[rank], rank))
        for rank, b in zip(ranks, round_bins, strict=True):
            plan[rank].append(bins[b])
            totals[rank] += bin_costs[b]
    return plan
