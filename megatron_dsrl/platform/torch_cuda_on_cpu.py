"""Megatron-core 0.19 on a machine without CUDA. The one place of the project that replaces others' functions.

Megatron asks `torch.cuda` for a device, streams, events and random states wherever it computes. Nothing of that is
essential to what it computes, so three layers answer for it, installed once and never where CUDA is present:

1. `_CpuDeviceMode`: a TorchFunctionMode, PyTorch's own hook, which redirects tensor calls that name a CUDA device;
2. functions of `torch.cuda` that Megatron calls: answered by the CPU generator, or by nothing;
3. Megatron functions that hold a CUDA generator object or suppose a fused CUDA optimizer.

`SITES` names, for every replaced function, a Megatron site that needs it.
"""

import contextlib
import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

SITES = {
    # replaced function -> file of megatron/core: function or class that calls it
    "current_device": "tensor_parallel/mappings.py: _gather_along_first_dim, where buffers are allocated",
    "set_device": "optimizer/cpu_offloading and dist_checkpointing workers",
    "synchronize": "timers.py: Timer.start",
    "empty_cache": "distributed/param_and_grad_buffer.py: reload_from_cpu",
    "get_rng_state": "tensor_parallel/random.py: CudaRNGStatesTracker.add",
    "set_rng_state": "tensor_parallel/random.py: restore of the default state",
    "manual_seed": "tensor_parallel/random.py: model_parallel_cuda_manual_seed",
    "current_stream": "distributed/param_and_grad_buffer.py: start_grad_sync",
    "default_stream": "pipeline_parallel/p2p_communication.py",
    "stream": "distributed/param_and_grad_buffer.py: start_grad_sync",
    "Stream": "distributed/distributed_data_parallel.py: side stream of the DDP hooks",
    "Event": "pipeline_parallel/combined_1f1b.py",
    "memory_allocated": "distributed/param_and_grad_buffer.py: logging of buffer sizes",
    "max_memory_allocated": "the same",
    "nvtx.range_push": "utils.py: nvtx_range_push, around every part of a layer",
    "nvtx.range_pop": "utils.py: nvtx_range_pop",
    "_get_cuda_rng_state": "tensor_parallel/random.py: CudaRNGStatesTracker.fork and activation recomputation",
    "_set_cuda_rng_state": "the same",
    "_set_main_param_and_optimizer_states": "optimizer/distrib_optimizer.py: loading a resharded checkpoint",
}

_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []  # holds the entered mode; its presence makes `install` idempotent


def install_torch_cuda_on_cpu() -> None:
    """Install all three layers in this process, once."""
    if _installed:
        return
    assert not torch.cuda.is_available(), "the CPU adapter must never be installed where CUDA is present"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron warns without it; it has no effect here
    torch.compiler.set_stance("force_eager")  # Megatron's @jit_fuser is torch.compile: minutes of C++ compilation
    _replace_torch_cuda_functions()
    _replace_megatron_functions()
    mode = _CpuDeviceMode()
    mode.__enter__()
    _installed.append(mode)


class _CpuDeviceMode(TorchFunctionMode):
    """Turns CUDA devices in tensor calls into the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:  # tensor_parallel/data.py: broadcast_data; optimizer/clip_grads.py
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # optimizer/optimizer.py tells parameters apart by the name 'torch.cuda.FloatTensor'
            name = func(*args)
            return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.record_stream:  # distributed/param_and_grad_buffer.py
            return None
        if func is torch.Tensor.pin_memory:  # optimizer/distrib_optimizer.py, offloading
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):  # optimizer/clip_grads.py
            args = (args[0], _CPU, *args[2:])
        if _is_cuda(kwargs.get("device")):  # torch.tensor(..., device="cuda"): pipeline_parallel/schedules.py
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):  # dist_checkpointing/strategies: staging buffers
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, torch.device) and device.type == "cuda"


class _NoStream:
    """A stream of a device that runs everything in program order."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> "_NoEvent":
        return event or _NoEvent()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _NoEvent:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _replace_torch_cuda_functions() -> None:
    stream = _NoStream()
    replacements = {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _NoStream,
        "Event": _NoEvent,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.nvtx.range_push = lambda message: None
    torch.cuda.nvtx.range_pop = lambda: None


def _replace_megatron_functions() -> None:
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = (
        lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    )
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_main_param_and_optimizer_states


@torch.no_grad()
def _set_main_param_and_optimizer_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
    """Copy a checkpoint's shard into the optimizer, as Megatron's method of this name does.

    Megatron expects one state tensor per parameter for every entry, as its fused CUDA Adam has. torch.optim.AdamW,
    the optimizer without apex and Transformer Engine, keeps a scalar `step` as well, which checkpoints do not hold.
    """
    group, order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group]["params"][order]
    for name, destination in {"param": main_param, **self.optimizer.state[main_param]}.items():
        if name != "step" and name in tensors:
            destination.copy_(tensors[name])
