"""Which sequences form which micro-batch on which data-parallel rank. Pure Python.

Invariants:
- every sequence is in exactly one micro-batch;
- all data-parallel ranks get the same number of micro-batches (a short rank gets empty ones);
- no micro-batch exceeds the token budget, unless it is one single sequence that does so alone;
- the number of micro-batches is the smallest that the greedy placement finds, and their costs are balanced;
- the plan depends on nothing but the arguments, so that every rank computes the same one.
"""

import heapq
from collections.abc import Sequence

MicroBatchPlan = list[list[list[int]]]
"""plan[data_parallel_rank][micro_batch] = indices of its sequences."""


def plan_micro_batches(
    lengths: Sequence[int], data_parallel_size: int, max_tokens: int, hidden_size: int
) -> MicroBatchPlan:
    """Balanced micro-batches within a token budget.

    Args:
        lengths: tokens of each sequence.
        data_parallel_size: number of model replicas.
        max_tokens: token budget of a micro-batch.
        hidden_size: of the model; it tells from which length on attention outweighs the linear layers.
    """
    costs = [_cost(length, hidden_size) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = max(1, -(-sum(lengths) // (max_tokens * data_parallel_size)))
    while (bins := _place(order, lengths, costs, count * data_parallel_size, max_tokens)) is None:
        count += 1
    return [bins[rank::data_parallel_size] for rank in range(data_parallel_size)]


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


def _cost(length: int, hidden_size: int) -> float:
    """Compute of one sequence up to a factor: linear layers take ~24 h^2 per token, causal attention ~2 h L."""
    return length * (12.0 * hidden_size + length)
