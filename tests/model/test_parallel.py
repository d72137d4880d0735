"""Process groups of one layout after another."""

import time

import psutil
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dsrl.common.collective import gather
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.support.distributed import run_distributed


def threads_during_and_after(layouts: list[ParallelConfig]) -> list[tuple[int, int]]:
    """Threads of this process in each layout, and when its groups are destroyed."""
    process, counts = psutil.Process(), []
    for layout in layouts:
        with parallel_layout(layout, seed=1):
            during = process.num_threads()
        counts.append((during, process.num_threads()))
    destroy_parallel()
    return counts


def test_a_layout_takes_its_threads_with_it() -> None:
    """Every process group of gloo has some, which wake up a hundred times a second."""
    layouts = [ParallelConfig(tensor_parallel_size=2), ParallelConfig(pipeline_parallel_size=2)]
    for rank in run_distributed(threads_during_and_after, 2, 2 * layouts):
        _, left = rank[0]
        assert all(during > left + 10 for during, _ in rank)
        assert [after for _, after in rank] == [left] * len(rank)


def wait_for_a_rank_that_comes_late(layout: ParallelConfig) -> str:
    """Rank 1 comes after the limit of Megatron's groups, first to a collective of all processes."""
    with parallel_layout(layout, seed=1):
        if dist.get_rank() == 1:
            time.sleep(3)
        gather("all")
        if dist.get_rank() == 1:
            time.sleep(3)
            return "late"
        with pytest.raises(RuntimeError, match="Timed out"):
            dist.all_reduce(torch.ones(1), group=parallel_state.get_tensor_model_parallel_group())
    return "noticed"


def test_megatrons_groups_have_their_own_limit() -> None:
    layout = ParallelConfig(tensor_parallel_size=2, distributed_timeout_seconds=1)
    assert run_distributed(wait_for_a_rank_that_comes_late, 2, layout) == ["noticed", "late"]
