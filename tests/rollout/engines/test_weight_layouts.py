"""The trainer's layout and the engines' are independent: what is pushed from one arrives in the other.

Two processes hold Megatron models in one layout after the other and push to the same engines, whose weights are made
random in between. SGLang's digests of every tensor on every engine rank must be those of the sent ones.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_dsrl.common.collective import barrier, rank
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.build import build_model
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.rollout.engines.engine_group import EngineGroup
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.weights.load import load_hf_weights
from megatron_dsrl.weights.stream import stream_hf_weights
from megatron_dsrl.weights.table import weight_table
from tests.support.distributed import run_distributed
from tests.support.engine import tiny_run_config, weights_checker
from tests.support.tiny_model import make_tiny_qwen3

LAYOUTS = {
    "TP2": {"tensor_parallel_size": 2},
    "PP2": {"pipeline_parallel_size": 2},
    "DP2": {},
}
BUCKET_BYTES = 100_000
"""Several buckets, of several tensors each."""


def push_from_every_layout(folder: Path, run_folder: Path, engine_size: int) -> list[str]:
    """The layouts whose push arrived, and at last the error of a push with a matrix missing."""
    config = tiny_run_config(
        folder, tensor_parallel_size=engine_size, check_weights="always", startup_timeout_seconds=240.0
    )
    arrived: list[str] = []
    engines = None
    try:
        for number, layout in enumerate(LAYOUTS, start=1):
            with parallel_layout(ParallelConfig(**LAYOUTS[layout]), seed=0):
                if engines is None:
                    engines = EngineGroup(config, run_folder)
                    engines.start()
                    engines.wait_until_ready()
                stream = streams_of(folder, ParallelConfig(**LAYOUTS[layout]))
                make_engines_random(engines)
                engines.load(stream, number)
                arrived.append(layout)
                if number == len(LAYOUTS):
                    with pytest.raises(UserError) as error:
                        engines.load(lambda: map(spoil, stream()), number + 1)
                    arrived.append(str(error.value))
    finally:
        if engines is not None:
            engines.close()
        destroy_parallel()
    return arrived


def streams_of(folder: Path, parallel: ParallelConfig) -> Callable[[], Iterator[Bucket]]:
    """Makes streams of a Megatron model with the folder's weights."""
    architecture = read_architecture(folder)
    table = weight_table(architecture)
    chunks = build_model(architecture, ModelConfig(path=str(folder), dtype="float32"), parallel)
    load_hf_weights(chunks, table, folder)
    return lambda: stream_hf_weights(chunks, table, BUCKET_BYTES, torch.float32)


def make_engines_random(engines: EngineGroup) -> None:
    if rank() == 0:
        for address in engines.addresses:
            weights_checker(address, "reset_tensors")
    barrier()


def spoil(bucket: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """One matrix is lost before it is sent."""
    return [(name, tensor) for name, tensor in bucket if name != "model.layers.3.self_attn.o_proj.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("engine_size", [1, 2], ids=["two engines", "one engine of two ranks"])
def test_weights_arrive_from_every_layout(engine_size, tmp_path) -> None:
    folder = tmp_path / "model"
    make_tiny_qwen3(folder, tied=False, vocab_size=101)  # the vocabulary is padded, otherwise in either

    for arrived in run_distributed(push_from_every_layout, 2, folder, tmp_path, engine_size, timeout_seconds=400):
        assert arrived[:-1] == list(LAYOUTS)
        for engine_rank in range(engine_size):
            assert f"engine rank {engine_rank}: model.layers.3.self_attn.o_proj.weight" in arrived[-1]
