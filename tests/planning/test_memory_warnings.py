"""What a run says at its start about its memory."""

from megatron_dsrl.planning.memory_warnings import Machine, memory_warnings
from tests.planning.test_fit import GPU_BYTES, ppo
from tests.planning.test_memory import paper_run


def test_a_run_on_gpus_warns_of_what_does_not_fit_and_says_what_helps(model) -> None:
    node = Machine("cuda", GPU_BYTES, host_bytes=2 * 10**12, processes=8)
    assert memory_warnings(paper_run(model), 8, node) == []
    (update, generation) = memory_warnings(ppo(model), 8, node)
    assert "an update takes" in update and "lower actor.max_tokens_per_micro_batch" in update
    assert "generation takes" in generation and "lower engine.memory_fraction" in generation
    small_host = Machine("cuda", GPU_BYTES, host_bytes=10**11, processes=8)
    (host,) = memory_warnings(paper_run(model), 8, small_host)
    assert "checkpoint copies of 8 processes take up to" in host and "set checkpoint.asynchronous=false" in host


def test_a_run_on_a_cpu_is_compared_with_the_memory_of_the_machine(model) -> None:
    settings = [model, "model.dtype=float32", "engine.max_total_tokens=32768", "parallel.tensor_parallel_size=1"]
    settings += ["parallel.sequence_parallel=false"]
    laptop, server = (Machine("cpu", size, size, processes=1) for size in (16 * 2**30, 2**41))
    (warning,) = memory_warnings(paper_run(*settings), 1, laptop)
    assert "1 process and the engines take" in warning
    assert memory_warnings(paper_run(*settings), 1, server) == []
