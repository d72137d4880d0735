"""What can be said about the CUDA platform without a device."""

import mmap
import os
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dsrl.platform.cuda import CudaPlatform, flight_recorder_variables


def test_tensors_on_devices_travel_over_nccl_and_python_objects_over_gloo():
    """PyTorch takes the CPU's backend for objects where there is one."""
    backends = dist.distributed_c10d.BackendConfig(dist.Backend(CudaPlatform.distributed_backend))
    assert backends.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}


def test_every_recorded_variable_is_one_that_pytorch_reads(tmp_path):
    """A name that it does not know would be ignored without a word."""
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    sources = "".join((include / name).read_text() for name in ("FlightRecorder.hpp", "ProcessGroupNCCL.hpp"))
    with open(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", "rb") as stream:
        library = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        for name in flight_recorder_variables(tmp_path):
            assert name in sources or library.find(name.encode()) >= 0, name


def test_collectives_are_recorded_in_the_run_folder_unless_the_user_said_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_DUMP_ON_TIMEOUT": "0"})
    CudaPlatform().record_collectives(tmp_path / "collectives")
    assert (tmp_path / "collectives").is_dir()
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "collectives" / "rank_")
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
