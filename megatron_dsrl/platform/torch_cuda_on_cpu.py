"""Adapter for Megatron-core 0.19 on a machine without CUDA. It replaces functions of torch and Megatron.

Megatron asks `torch.cuda` for a device, a stream and random states throughout its code, though its computations do not
depend on CUDA. Three layers answer these calls. They are installed once, and never if CUDA is available:

1. `_CpuDeviceMode`: a TorchFunctionMode, PyTorch's own hook, which redirects tensor calls that name a CUDA device;
2. the five functions of `torch.cuda` that Megatron calls: they use the CPU generator or do nothing;
3. six Megatron functions that use a CUDA generator object, or assume a fused CUDA optimizer, CUDA tensors, or
   collectives of parts of unequal length, which gloo does not support; and one stream.

A comment at each replacement lists the Megatron code (file: function, under megatron/core) that needs it. The list
comes from tracing training steps in all supported layouts, both optimizers, all recompute modes, and a checkpoint save
and load; a newly used feature of Megatron may need another replacement.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_TENSOR_CUDA = torch.Tensor.cuda
_TENSOR_TYPE = torch.Tensor.type
_installed: list[TorchFunctionMode] = []  # the entered mode; makes the installation idempotent


def install_torch_cuda_on_cpu() -> None:
    """Install all three layers in this process. Idempotent. The mode applies to the calling thread, which must be the
    one that builds and trains the model."""
    if _installed:
        return
    assert not torch.cuda.is_available(), "the CPU adapter must never be installed where CUDA is present"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # tensor_parallel/layers.py warns without it
    torch.compiler.set_stance("force_eager")  # Megatron's @jit_fuser is torch.compile: minutes of C++ compilation
    _replace_torch_cuda_functions()
    _replace_megatron_functions()
    mode = _CpuDeviceMode()
    mode.__enter__()
    _installed.append(mode)


class _CpuDeviceMode(TorchFunctionMode):
    """Turns CUDA devices in tensor calls into the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        # Every call of a tensor function passes through here, so the common case must be cheap.
        if func is _TENSOR_CUDA:
            # models/common/language_module: setup_embeddings_and_output_layer;
            # optimizer/distrib_optimizer.py: get_parameter_state_dp_zero
            return args[0]
        if not kwargs:
            if func is _TENSOR_TYPE and len(args) == 1:
                # optimizer/optimizer.py and distrib_optimizer.py distinguish parameters by type names such as
                # 'torch.cuda.FloatTensor'; optimizer/clip_grads.py: clip_grad_by_total_norm_fp32
                name = func(*args)
                return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)
            return func(*args)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            # pipeline_parallel/schedules.py: token counts; optimizer/clip_grads.py: norms; optimizer/optimizer.py:
            # found-infinity and loss-scale tensors; utils.py: local_multi_tensor_l2_norm
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, torch.device) and device.type == "cuda"


def _replace_torch_cuda_functions() -> None:
    # tensor_parallel/mappings.py, layers.py, pipeline_parallel/p2p_communication.py,
    # distributed/param_and_grad_buffer.py, rotary_pos_embedding.py, optimizer/distrib_optimizer.py: device of buffers
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]  # a device instead of an index
    # distributed/param_and_grad_buffer.py: start_grad_sync, which uses the stream only with CUDA graphs
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment, return-value]  # never used
    # pipeline_parallel/p2p_communication.py: _communicate_shapes; dist_checkpointing/strategies/filesystem_async.py
    torch.cuda.synchronize = lambda device=None: None
    # tensor_parallel/random.py: CudaRNGStatesTracker.add
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    # tensor_parallel/random.py: model_parallel_cuda_manual_seed, CudaRNGStatesTracker.add
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))  # type: ignore[assignment]


def _replace_megatron_functions() -> None:
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    # tensor_parallel/random.py: CudaRNGStatesTracker.add and fork, activation recomputation
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    # optimizer/distrib_optimizer.py: loading a checkpoint
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_main_param_and_optimizer_states
    # transformer/moe/token_dispatcher.py: a stream for copies to the host, created unless it exists; and these copies,
    # which convert sizes to the NumPy arrays that torch.distributed takes, but only from a CUDA device
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _NoStream()
    token_dispatcher.maybe_move_tensor_to_cpu = _host_tensor

    # tensor_parallel/mappings.py: with both tensor parallelism of experts and expert parallelism
    mappings._gather_along_first_dim = _with_unequal_parts(mappings._gather_along_first_dim, _gather_unequal)
    mappings._reduce_scatter_along_first_dim = _with_unequal_parts(
        mappings._reduce_scatter_along_first_dim, _reduce_scatter_unequal
    )


def _with_unequal_parts(original: Callable, unequal: Callable) -> Callable:
    """Megatron's collective along the first dimension, replaced by `unequal` for parts of different lengths."""

    def collective(
        tensor: torch.Tensor, group: Any, lengths: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if lengths is None or len(set(lengths)) == 1:
            return original(tensor, group, lengths, use_global_buffer)
        return unequal(tensor, group, lengths)

    return collective


def _gather_unequal(own: torch.Tensor, group: Any, lengths: list[int]) -> torch.Tensor:
    """All ranks' parts in rank order; each is padded to the longest for sending."""
    padded = own.new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own
    received = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(received, padded, group=group)
    return torch.cat([part[:length] for part, length in zip(received, lengths)])


def _reduce_scatter_unequal(tensor: torch.Tensor, group: Any, lengths: list[int]) -> torch.Tensor:
    """This rank's part of the sum over ranks; every rank computes the whole sum."""
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total.split(lengths)[group.rank()].clone()


def _host_tensor(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's `maybe_move_tensor_to_cpu` for tensors that already are on the host."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _NoStream:
    """A CUDA stream and its events for synchronous execution."""

    def wait_stream(self, stream: None) -> None:
        """Nothing to wait for."""

    def record_event(self) -> "_NoStream":
        return self

    def synchronize(self) -> None:
        """Everything is already done."""


@torch.no_grad()
def _set_main_param_and_optimizer_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
    """Copy a checkpoint's shard into the optimizer, like Megatron's method of the same name.

    Megatron expects every entry of the optimizer state in the checkpoint, as with its fused CUDA Adam.
    torch.optim.AdamW, used without apex and Transformer Engine, also has a scalar `step`, which checkpoints do not
    contain.
    """
    group, order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group]["params"][order]
    for name, destination in {"param": main_param, **self.optimizer.state[main_param]}.items():
        if name != "step" and name in tensors:
            destination.copy_(tensors[name])
