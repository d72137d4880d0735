"""The invariants of the micro-batch plan, as its docstring states them."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.actor.micro_batch_plan import plan_micro_batches

LENGTHS = st.lists(st.integers(min_value=1, max_value=500), max_size=60)


@given(lengths=LENGTHS, data_parallel_size=st.integers(1, 4), max_tokens=st.integers(1, 800))
def test_every_sequence_once_within_the_budget_and_equal_counts(lengths, data_parallel_size, max_tokens):
    plan = plan_micro_batches(lengths, data_parallel_size, max_tokens, hidden_size=64)

    micro_batches = [micro_batch for rank in plan for micro_batch in rank]
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(range(len(lengths)))
    assert len(plan) == data_parallel_size
    assert len({len(rank) for rank in plan}) == 1 and len(plan[0]) >= 1
    for micro_batch in micro_batches:
        assert sum(lengths[i] for i in micro_batch) <= max_tokens or len(micro_batch) == 1
    assert plan == plan_micro_batches(lengths, data_parallel_size, max_tokens, hidden_size=64)


def test_equal_sequences_are_spread_evenly():
    plan = plan_micro_batches([10] * 16, data_parallel_size=2, max_tokens=40, hidden_size=64)
    assert [[len(micro_batch) for micro_batch in rank] for rank in plan] == [[4, 4], [4, 4]]


def test_one_long_sequence_stands_against_many_short_ones_of_the_same_cost():
    long, short = 1000, [100] * 5
    plan = plan_micro_batches([long, *short], data_parallel_size=2, max_tokens=10_000, hidden_size=8)
    assert sorted(sorted(rank[0]) for rank in plan) == [[0], [1, 2, 3, 4, 5]]
