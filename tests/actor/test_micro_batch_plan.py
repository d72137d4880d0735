"""The invariants of the micro-batch plan, as its docstring states them."""

import math
from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.actor.micro_batch_plan import SequenceCost, plan_micro_batches

LENGTHS = st.lists(st.integers(min_value=1, max_value=500), max_size=60)
RANKS = st.integers(1, 4)
COST = SequenceCost(per_token=768.0, per_token_and_length=1.0)
COSTS = st.builds(SequenceCost, st.floats(1, 1e4), st.floats(0, 1e3))
ROUNDING = 1 + 1e-9


def cost_of(micro_batch: Sequence[int], lengths: Sequence[int], cost: Callable[[int], float]) -> float:
    return sum(cost(lengths[i]) for i in micro_batch)


@given(lengths=LENGTHS, ranks=RANKS, max_tokens=st.integers(1, 800), cost=COSTS, multiple_of=st.integers(1, 4))
def test_every_sequence_once_within_the_budget_and_equal_counts(lengths, ranks, max_tokens, cost, multiple_of) -> None:
    plan = plan_micro_batches(lengths, ranks, max_tokens, cost, multiple_of)

    micro_batches = [micro_batch for rank in plan for micro_batch in rank]
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(range(len(lengths)))
    assert len(plan) == ranks
    (count,) = {len(rank) for rank in plan}
    assert count >= 1 and count % multiple_of == 0
    assert count - multiple_of < max(1, math.ceil(len(lengths) / ranks)), "not more than sequences need"
    for micro_batch in micro_batches:
        assert sum(lengths[i] for i in micro_batch) <= max_tokens or len(micro_batch) == 1
    assert plan == plan_micro_batches(lengths, ranks, max_tokens, cost, multiple_of)


@given(lengths=LENGTHS.filter(bool), ranks=RANKS, multiple_of=st.integers(1, 4), cost=COSTS)
def test_without_a_binding_budget_no_micro_batch_exceeds_the_mean_by_more_than_a_sequence(
    lengths, ranks, multiple_of, cost
) -> None:
    plan = plan_micro_batches(lengths, ranks, sum(lengths), cost, multiple_of)
    costs = [cost_of(micro_batch, lengths, cost) for rank in plan for micro_batch in rank]
    assert len(costs) == ranks * multiple_of, "as few as possible"
    assert max(costs) <= ROUNDING * (sum(costs) / len(costs) + max(map(cost, lengths)))


@given(lengths=LENGTHS, ranks=RANKS, max_tokens=st.integers(1, 800), cost=COSTS)
def test_ranks_differ_in_all_by_no_more_than_they_do_in_one_micro_batch(lengths, ranks, max_tokens, cost) -> None:
    plan = plan_micro_batches(lengths, ranks, max_tokens, cost)
    costs = [[cost_of(micro_batch, lengths, cost) for micro_batch in rank] for rank in plan]
    totals = [sum(rank) for rank in costs]
    spreads = [max(turn) - min(turn) for turn in zip(*costs)]
    assert max(totals) - min(totals) <= max(spreads) + 1e-9 * max(totals)


@given(lengths=LENGTHS, ranks=RANKS, max_tokens=st.integers(1, 800))
def test_micro_batches_of_a_number_are_neighbours_in_cost_the_costliest_first(lengths, ranks, max_tokens) -> None:
    plan = plan_micro_batches(lengths, ranks, max_tokens, COST)
    turns = [[cost_of(micro_batch, lengths, COST) for micro_batch in turn] for turn in zip(*plan)]
    for earlier, later in zip(turns, turns[1:]):
        assert min(earlier) >= max(later)


def test_equal_sequences_are_spread_evenly() -> None:
    plan = plan_micro_batches([10] * 16, data_parallel_size=2, max_tokens=40, cost=COST)
    assert [[len(micro_batch) for micro_batch in rank] for rank in plan] == [[4, 4], [4, 4]]


def test_one_long_sequence_stands_against_many_short_ones_of_the_same_cost() -> None:
    """Attention counts: 1,000 tokens of one sequence cost more than 500 of five, and about as much as 5 x 200."""
    cost = SequenceCost(per_token=96.0, per_token_and_length=1.0)
    plan = plan_micro_batches([1000, *[100] * 5], data_parallel_size=2, max_tokens=10_000, cost=cost)
    assert sorted(sorted(rank[0]) for rank in plan) == [[0], [1, 2, 3, 4, 5]]


def test_cost_of_a_layer_of_qwen3_8b() -> None:
    """192,937,984 weights in the matrices of a layer (head size 128, 8 key/value heads, 12,288 inner channels), and
    4,096 channels of attention: 2 FLOPs per weight; 4 per channel and pair of tokens, half of the pairs masked."""
    cost = SequenceCost.for_layer(4096, 32, 8, 128, 12288)
    assert cost(1) == 2 * 192_937_984 + 2 * 4096
    assert cost(8192) == 8192 * 2 * 192_937_984 + 4 * 4096 * 8192**2 / 2
