"""What can be said about the CUDA platform without a device."""

import mmap
import os
import pickle
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.platform import cuda
from megatron_dsrl.platform.cuda import CudaPlatform, flight_recorder_variables
from tests.support.distributed import run_distributed


def test_tensors_on_devices_travel_over_nccl_and_python_objects_over_gloo() -> None:
    """PyTorch takes the CPU's backend for objects if the group has one."""
    backends = dist.distributed_c10d.BackendConfig(dist.Backend(CudaPlatform.distributed_backend))
    assert backends.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}


def test_every_recorded_variable_is_one_that_pytorch_reads(tmp_path) -> None:
    """A name that it does not know would be ignored without a word."""
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    sources = "".join((include / name).read_text() for name in ("FlightRecorder.hpp", "ProcessGroupNCCL.hpp"))
    with open(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", "rb") as stream:
        library = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        for name in flight_recorder_variables(tmp_path):
            assert name in sources or library.find(name.encode()) >= 0, name


def test_collectives_are_recorded_in_the_run_folder_unless_the_user_said_otherwise(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"})
    CudaPlatform().record_collectives(tmp_path / "collectives")
    assert (tmp_path / "collectives").is_dir()
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "collectives" / "rank_")
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"


def test_a_process_that_does_not_see_its_gpu_says_what_to_change(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="LOCAL_RANK is 3, but this process sees only 1 GPU.*--gpus-per-task"):
        CudaPlatform().install()


@pytest.mark.parametrize(
    ("capability", "flash_attention", "attends"),
    [((8, 0), False, False), ((8, 0), True, True), ((9, 0), False, True), ((10, 0), False, True)],
)
def test_packed_rows_need_hopper_or_flash_attention_2(monkeypatch, capability, flash_attention, attends) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cuda, "_is_installed", lambda package: package == "flash-attn" and flash_attention)
    assert CudaPlatform().attends_to_packed_rows == attends


def test_memory_that_the_engine_has_released_is_collected_before_the_cache_is_emptied(monkeypatch) -> None:
    calls: list[str] = []
    for name in ("ipc_collect", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    CudaPlatform().release_cached_memory()
    assert calls == ["ipc_collect", "empty_cache"]


def leave_a_record(folder: Path) -> None:
    """Record two all-reduces; rank 1 does not take part in the second."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    rank = dist.get_rank()
    dist.all_reduce(torch.ones(3))
    if rank == 0:
        with pytest.raises(RuntimeError, match="Timed out"):
            dist.all_reduce(torch.ones(5))
    else:
        time.sleep(5)
    record = pickle.loads(torch._C._distributed_c10d._dump_fr_trace())
    # NCCL's processes say who is in a group; gloo's do not.
    record["pg_config"] = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1]"}}
    (folder / f"rank_{rank}").write_bytes(pickle.dumps(record))


@pytest.mark.slow
def test_the_documented_command_names_the_rank_that_did_not_take_part(tmp_path, monkeypatch) -> None:
    """On what PyTorch's flight recorder wrote of gloo processes: NCCL ones need devices."""
    name = "TORCH_FR_BUFFER_SIZE"
    monkeypatch.setenv(name, flight_recorder_variables(tmp_path)[name])
    run_distributed(leave_a_record, 2, tmp_path)
    command = shutil.which("torchfrtrace", path=Path(sys.executable).parent)
    said = subprocess.run(
        [command, "--prefix", "rank_", str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    shown = said.stdout + said.stderr
    assert "Not all ranks joining collective" in shown and "missing ranks: {1}" in shown
    assert "input sizes: [[5]]" in shown
