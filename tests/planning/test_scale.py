"""A step on many GPUs, on paper: every part by hand, and what counts as the first limit."""

from dataclasses import fields, replace

import pytest

from megatron_dsrl.planning.gpus import find_gpu
from megatron_dsrl.planning.planned_run import Assumptions, PlannedRun
from megatron_dsrl.planning.scale import PARTS, Costs, StepEstimate, estimate_step, first_limit, with_batch_for
from tests.planning.test_memory import paper_run
from tests.planning.test_parameters import qwen3_8b

COSTS = Costs(
    read_seconds=1e-6,
    read_json_seconds=3e-6,
    pickle_seconds=2e-8,
    unpickle_seconds=8e-8,
    shared_bytes=10.0,
    gloo_bytes_per_second=1e9,
    verify_seconds=1e-3,
    push_bytes_per_second=1e10,
    network_bytes_per_second=4e10,
    node_bytes_per_second=4e11,
    hop_seconds=1e-5,
    failures_per_gpu_hour=1e-4,
)


def planned(world_size: int, *overrides: str) -> PlannedRun:
    assumed = Assumptions(mean_response_tokens=4000)
    return PlannedRun(paper_run(*overrides), qwen3_8b(), find_gpu("h100"), world_size, assumed)


def estimate(world_size: int, factor: int = 1) -> StepEstimate:
    return estimate_step(with_batch_for(planned(world_size), factor), COSTS)


def test_other_servers_answer_in_json_which_takes_longer_to_read() -> None:
    step = estimate_step(planned(8, "engine.urls=[http://gpu:30000]"), COSTS)
    assert step.reading == pytest.approx(1024 * 4000 * 3e-6)


def test_every_part_by_hand_on_64_gpus() -> None:
    """TP 4, so 16 replicas; 8 x 1,024 samples of 4,000 tokens; 16 verifiers; 6 rounds of a tree over 64 ranks."""
    step = estimate(64, factor=8)
    tokens = 8192 * 4000
    assert step.samples == 8192 and step.tokens == tokens
    assert step.reading == pytest.approx(tokens * 1e-6)
    assert step.judging == pytest.approx(8192 * 1e-3 / 16)
    assert step.sharing == pytest.approx(tokens * 1e-7 + 6 * tokens * 10 / 1e9)
    parameters = 8_190_735_360
    assert step.weight_push == pytest.approx(2 * parameters / 1e10)
    gradients = 6 * (parameters / 4) * (15 / 16) / 4e10 + 30 * 1e-5
    assert step.gradients == pytest.approx(gradients, rel=1e-3)  # norms are not split
    assert step.longest_response == pytest.approx(8192 * 2 * parameters / (3.35e12 * 0.6))
    assert step.hours_between_failures == pytest.approx(1 / (64 * 1e-4))
    assert step.generation == max(step.decoding, step.longest_response, step.reading, step.judging)
    assert step.step == pytest.approx(step.generation + step.sharing + step.update + step.gradients + step.weight_push)


def test_gradients_stay_within_a_node_of_eight() -> None:
    """Two replicas of TP 4, so half of 6 bytes per parameter of a rank, over NVLink."""
    assert estimate(8).gradients == pytest.approx(6 * 8_190_735_360 / 4 / 2 / 4e11 + 2e-5, rel=1e-3)


def test_growing_with_the_gpus_leaves_compute_as_it_is_and_a_fixed_batch_divides_it() -> None:
    small, growing, fixed = estimate(8), estimate(512, factor=64), estimate(512)
    assert growing.decoding == pytest.approx(small.decoding) and growing.update == pytest.approx(small.update)
    assert fixed.update == pytest.approx(small.update / 64)
    assert fixed.generation == fixed.longest_response, "nothing makes one response faster"


def test_the_first_limit_is_the_part_that_lengthens_the_step_most() -> None:
    assert first_limit([estimate(8), estimate(16, factor=2)]) is None
    world_size, part = first_limit([estimate(8), estimate(16, 2), estimate(4096, 512), estimate(8192, 1024)])
    assert (world_size, part) == (4096, "reading")
    slow = replace(estimate(4096, 512), reading=0.0, weight_push=1e6)
    assert first_limit([estimate(8), slow]) == (4096, "weight_push")


def test_reading_counts_only_beyond_the_generation_that_hides_it() -> None:
    first = estimate(8)
    hidden = replace(first, world_size=64, reading=0.99 * first.generation)
    assert first_limit([first, hidden]) is None


def test_every_constant_says_where_it_comes_from() -> None:
    for constant in fields(Costs):
        source = constant.metadata["source"]
        assert any(word in source for word in ("measured", "assumed", "reported", "data sheet", "arXiv")), constant.name
    assert set(PARTS) <= {field.name for field in fields(StepEstimate)}
