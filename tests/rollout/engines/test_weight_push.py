"""Pushing buckets to a real engine."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rollout.engines.flattened_bucket import ALIGNMENT_BYTES, Bucket, BucketMemory, flatten
from megatron_dsrl.rollout.engines.weight_push import SHARED_MEMORY, check_shared_memory, push_weights
from tests.support.engine import server_process, tiny_run_config

STOPPED_SECONDS = 1.0
DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


def test_memory_is_used_again_only_when_the_engine_has_confirmed_what_was_in_it(engine_rollout) -> None:
    """The engine is stopped before it gets the second bucket. While it has that to copy, the third one is filled, but
    none is taken that would overwrite the second."""
    (engine,) = engine_rollout.engine_addresses
    group = server_process(engine)
    weight = torch.ones(64)
    waited = []

    def buckets() -> Iterator[Bucket]:
        yield [("model.norm.weight", weight)]
        os.killpg(group, signal.SIGSTOP)
        go_on = threading.Timer(STOPPED_SECONDS, os.killpg, [group, signal.SIGCONT])
        begin = time.monotonic()  # before the timer, whose thread may take a moment to start
        go_on.start()
        yield [("model.norm.weight", weight)]
        yield [("model.norm.weight", weight)]
        waited.append(time.monotonic() - begin)
        go_on.join()

    version = engine_rollout.weight_version
    assert push_weights(buckets(), version, engine, group=None, timeout_seconds=60.0) is None
    assert waited[0] >= STOPPED_SECONDS


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=6))
def test_a_flattened_bucket_holds_every_tensor_bit_for_bit(kinds) -> None:
    generator = torch.Generator().manual_seed(0)
    bucket = [
        (str(number), torch.randint(0, 100, shape, generator=generator).to(dtype))
        for number, (dtype, shape) in enumerate(kinds)
    ]

    memory = BucketMemory()
    flatten([("larger", torch.full((1000,), 7.0))], memory)  # what lay there before

    flattened = flatten(bucket, memory)

    for entry, (name, tensor) in zip(flattened["metadata"], bucket, strict=True):
        copy = flattened["flattened_tensor"][entry.start_idx : entry.end_idx].view(entry.dtype).reshape(entry.shape)
        assert entry.name == name and entry.start_idx % ALIGNMENT_BYTES == 0
        assert torch.equal(copy, tensor)


def test_on_a_cpu_two_buckets_take_turns_in_the_same_memory() -> None:
    """While the engine copies one, the next one is filled."""
    memory = BucketMemory()
    buckets = [flatten([("weight", torch.full((1000,), float(value)))], memory) for value in (1, 2)]
    first, second = (bucket["flattened_tensor"] for bucket in buckets)
    assert torch.equal(first.view(torch.float32), torch.ones(1000))
    assert flatten([("weight", torch.zeros(10))], memory)["flattened_tensor"].data_ptr() == first.data_ptr()
    assert torch.equal(second.view(torch.float32), torch.full((1000,), 2.0))


def test_a_bucket_is_never_empty() -> None:
    with pytest.raises(AssertionError):
        flatten([], BucketMemory())


def test_shared_memory_must_hold_a_bucket_of_every_rank(tiny_model_folder, monkeypatch) -> None:
    config = tiny_run_config(tiny_model_folder)
    size = sum(file.stat().st_size for file in tiny_model_folder.glob("*.safetensors"))  # float32, in one bucket

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * size))
    check_shared_memory(config, ranks=2)
    with pytest.raises(UserError, match="engine.weight_bucket_megabytes: .* for each of 4 process.*shm-size"):
        check_shared_memory(config, ranks=4)
    assert SHARED_MEMORY.is_dir()
