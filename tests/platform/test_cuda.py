"""What can be said about the CUDA platform without a device."""

import torch.distributed as dist

from megatron_dsrl.platform.cuda import CudaPlatform


def test_tensors_on_devices_travel_over_nccl_and_python_objects_over_gloo():
    """PyTorch takes the CPU's backend for objects where there is one."""
    backends = dist.distributed_c10d.BackendConfig(dist.Backend(CudaPlatform.distributed_backend))
    assert backends.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
