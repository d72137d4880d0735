"""Engines and ranks: several engines, one engine of several ranks, and settings that cannot work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.server_arguments import server_arguments
from tests.support.engine import STOP_TOKEN_ID, decode_as_numbers, tiny_run_config


@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_engine", [1, 2])
def test_two_ranks_push_to_two_engines_or_to_one_that_they_share(ranks_per_engine, tiny_model_folder, tmp_path) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    arguments = [str(tiny_model_folder), str(tmp_path), str(ranks_per_engine)]

    torchrun = subprocess.Popen(
        [*program, "-m", "tests.support.push_and_sample", *arguments],
        cwd=Path(__file__).resolve().parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        output, _ = torchrun.communicate(timeout=240)
    finally:
        torchrun.terminate()  # not kill: torchrun then ends its processes
        torchrun.wait(60)

    assert torchrun.returncode == 0
    differences = json.loads(output.splitlines()[-1])
    assert len(differences) == 12
    assert max(differences) < 1e-4
    assert len(list((tmp_path / "engines").glob("*.log"))) == 2 // ranks_per_engine


def test_a_context_that_is_too_short_is_named(tiny_model_folder) -> None:
    config = tiny_run_config(tiny_model_folder, max_context_tokens=50)

    with pytest.raises(UserError, match="max_context_tokens = 50 is less than .* = 88"):
        server_arguments(config, engine=0)


def test_the_cache_size_must_be_given_without_cuda(tiny_model_folder) -> None:
    if torch.cuda.is_available():
        pytest.skip("SGLang measures the device")
    with pytest.raises(UserError, match="engine.max_total_tokens must be set"):
        server_arguments(tiny_run_config(tiny_model_folder, max_total_tokens=None), engine=0)


def test_processes_must_divide_into_engines(tiny_model_folder, tmp_path) -> None:
    config = tiny_run_config(tiny_model_folder, tensor_parallel_size=2)

    with pytest.raises(UserError, match="1 process cannot be divided into engines of 2"):
        EngineRollout(config, tmp_path, (STOP_TOKEN_ID,), decode_as_numbers)
