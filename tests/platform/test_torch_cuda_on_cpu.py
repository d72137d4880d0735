"""Megatron's calls of CUDA are answered on CPU, and nothing else changes."""

import pytest
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.platform import current_platform
from tests.support.distributed import run_distributed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter is for machines without CUDA")


@pytest.fixture(autouse=True)
def installed() -> None:
    current_platform().install()


def test_installing_twice_changes_nothing() -> None:
    answers = torch.cuda.current_device, torch.cuda.manual_seed, torch.overrides._get_current_function_mode_stack()
    current_platform().install()
    assert answers == (
        torch.cuda.current_device,
        torch.cuda.manual_seed,
        torch.overrides._get_current_function_mode_stack(),
    )


def test_tensors_for_cuda_are_made_on_cpu() -> None:
    made = [
        torch.zeros(2, device="cuda"),
        torch.tensor([0.0, 0.0], device=torch.device("cuda", 0)),
        torch.empty(2, device=torch.cuda.current_device()).zero_(),
        torch.zeros(2).cuda(),
    ]
    assert all(tensor.device.type == "cpu" and tensor.tolist() == [0, 0] for tensor in made)


def test_parameters_have_the_type_names_that_megatron_looks_for() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64


def test_megatrons_random_states_are_streams_of_the_cpu_generator() -> None:
    """A fork continues its own stream and leaves the outer one where it was."""
    tracker = CudaRNGStatesTracker()
    tracker.add("dropout", 7)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(1)
    outer = torch.rand(2, generator=torch.Generator().manual_seed(1))
    drawn = [torch.rand(1)]
    with tracker.fork("dropout"):
        inside = [torch.rand(2)]
    drawn.append(torch.rand(1))
    with tracker.fork("dropout"):
        inside.append(torch.rand(2))
    assert torch.equal(torch.cat(inside), expected)
    assert torch.equal(torch.cat(drawn), outer)


def test_memory_statistics_follow_an_allocation() -> None:
    platform = current_platform()
    before = platform.memory_statistics()
    held = torch.ones(2**25)  # 128 MiB of float32
    after = platform.memory_statistics()
    assert after.allocated_bytes - before.allocated_bytes > 0.9 * held.nbytes
    assert after.peak_bytes >= after.allocated_bytes * 0.9


def test_the_recent_peak_restarts_and_the_overall_one_stays() -> None:
    platform = current_platform()
    size = torch.ones(2**26).nbytes  # 256 MiB, gone at once
    before = platform.memory_statistics()
    platform.restart_peak_memory()
    after = platform.memory_statistics()
    assert before.recent_peak_bytes - after.recent_peak_bytes > 0.9 * size
    assert after.peak_bytes >= before.peak_bytes


def parts_of_unequal_length() -> list[list[float]]:
    """Two processes gather and reduce-scatter parts of one and of three rows; forward and backward."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    parallel = ParallelConfig(tensor_parallel_size=2, collective_timeout_seconds=60)
    with parallel_layout(parallel, seed=1):
        rank, lengths = dist.get_rank(), [1, 3]
        own = torch.arange(lengths[rank], dtype=torch.float32)[:, None].add(10 * rank).requires_grad_()
        whole = mappings.gather_from_sequence_parallel_region(own, output_split_sizes=lengths)
        (whole * torch.tensor([[1.0], [2.0], [3.0], [4.0]])).sum().backward()
        part = mappings.reduce_scatter_to_sequence_parallel_region(whole.detach(), input_split_sizes=lengths)
        results = [whole.flatten().tolist(), own.grad.flatten().tolist(), part.flatten().tolist()]
    destroy_parallel()
    return results


def test_collectives_of_unequal_parts() -> None:
    """Gloo has none; Megatron needs them where experts are split and dealt out at the same time."""
    first, second = run_distributed(parts_of_unequal_length, 2)
    assert first[0] == second[0] == [0.0, 10.0, 11.0, 12.0]
    assert first[1:] == [[2.0], [0.0]]
    assert second[1:] == [[4.0, 6.0, 8.0], [20.0, 22.0, 24.0]]
