"""Process groups of one layout after another."""

import psutil

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
