"""The real Python of Transformer Engine on a machine without CUDA, with PyTorch versions of its compiled kernels.

What a cluster executes between Megatron and the kernels runs here: layers, parameter names, attention backends, ring
attention, gradient accumulation into `main_grad`, FusedAdam, `_extra_state`. It needs the packages of
tools/requirements-transformer-engine.lock in a separate folder, where nothing else finds them: an installed
`transformer_engine` without its compiled parts would break every import of Megatron.
"""

import dataclasses
import os
import sys
import warnings
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

FOLDER_VARIABLE = "DSRL_TRANSFORMER_ENGINE"
HOPPER = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 * 10**9, name="NVIDIA H100")
PACKAGE = "transformer_engine"
GET_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
GET_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
ATTENTION_BACKENDS = "transformer_engine.pytorch.attention.dot_product_attention.backends"


def packages_folder() -> Path:
    """Where the packages are: `DSRL_TRANSFORMER_ENGINE`, or a folder of the environment that `--dev` makes."""
    return Path(os.environ.get(FOLDER_VARIABLE, Path(sys.prefix, "transformer-engine")))


needs_transformer_engine = pytest.mark.skipif(
    not (packages_folder() / PACKAGE).is_dir(),
    reason=f"no Transformer Engine in {packages_folder()}: bash tools/setup_cpu.sh --dev",
)


def install() -> None:
    """Make Transformer Engine importable, and have the CPU platform use it. Call it before anything imports Megatron.

    Needs its own process, since Megatron looks for Transformer Engine when it is imported.
    """
    assert "megatron" not in sys.modules, "Megatron was imported without Transformer Engine"
    from tests.support.transformer_engine_on_cpu.extension import NAME, make_extension

    sys.path.insert(0, str(packages_folder()))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no look for shared libraries
    sys.modules[NAME] = make_extension()
    sys.modules["fused_weight_gradient_mlp_cuda"] = _apex_kernels()
    _replace_torch_cuda_functions()

    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # that its compiled library is missing
        import transformer_engine.pytorch  # noqa: F401

    _accept_float32()
    _wait_once()
    _prepare_platform()
    torch.cuda.current_stream = lambda device=None: _NoStream()  # type: ignore[assignment, return-value]
    _AsOnCuda().__enter__()  # after the platform's mode, which would otherwise stand between it and its callers
    _enter_modes_in_backward_passes()


def _replace_torch_cuda_functions() -> None:
    """What Transformer Engine asks of the device, a Hopper, and of its streams, which a CPU does not have."""
    torch.cuda.get_device_properties = lambda device=None: HOPPER  # type: ignore[assignment, return-value]
    torch.cuda.get_device_capability = lambda device=None: (HOPPER.major, HOPPER.minor)
    torch.cuda.is_available = lambda: _called_by_transformer_engine(depth=2)
    torch.cuda.is_current_stream_capturing = lambda: False
    # Ring attention computes on two streams that wait for each other.
    torch.cuda.Stream = torch.cuda.Event = _NoStream  # type: ignore[assignment, misc]
    torch.cuda.stream = nullcontext  # type: ignore[assignment]


class _NoStream:
    """A CUDA stream or event of synchronous execution."""

    def wait_stream(self, stream: Any) -> None:
        """Everything is done already."""

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> "_NoStream":
        return self

    def record(self, stream: Any = None) -> None:
        """Nothing to wait for."""


class _AsOnCuda(TorchFunctionMode):
    """Answers Transformer Engine's questions about tensors so that it accepts float32 tensors on CPU.

    `is_cuda` is True; the dtype is bfloat16 where the fused attention checks it. (The comparisons with local layers are
    in float32, since they are sharper. With bfloat16 the dtype is already the right one.)
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func == GET_IS_CUDA and _called_by_transformer_engine(depth=2):
            return True
        if func == GET_DTYPE and _is_attention_assertion(sys._getframe(1)):
            return torch.bfloat16
        return func(*args, **(kwargs or {}))


def _wait_once() -> None:
    """Ring attention waits twice for what it has received, which gloo mistakes for waiting for another message."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    communicate = context_parallel.flash_attn_p2p_communicate
    context_parallel.flash_attn_p2p_communicate = lambda *args: [_WaitedOnce(work) for work in communicate(*args)]


class _WaitedOnce:
    """A send or receive."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self) -> None:
        """Returns at once when it is called again."""
        work, self._work = self._work, None
        if work is not None:
            work.wait()


def _enter_modes_in_backward_passes() -> None:
    """Autograd calls backward functions without the modes of the calling thread."""
    from torch.autograd.function import BackwardCFunction

    from megatron_dsrl.platform.torch_cuda_on_cpu import _CpuDeviceMode

    apply = BackwardCFunction.apply

    def apply_with_modes(self: BackwardCFunction, *args: Any) -> Any:
        with _CpuDeviceMode(), _AsOnCuda():
            return apply(self, *args)

    BackwardCFunction.apply = apply_with_modes  # type: ignore[method-assign]


def _called_by_transformer_engine(depth: int) -> bool:
    return sys._getframe(depth).f_globals.get("__name__", "").startswith(PACKAGE)


def _is_attention_assertion(frame: FrameType) -> bool:
    return frame.f_code.co_name == "<genexpr>" and frame.f_globals.get("__name__") == ATTENTION_BACKENDS


def _accept_float32() -> None:
    """Have Transformer Engine choose its attention as for bfloat16."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    choose = utils.get_attention_backend

    def choose_as_for_bfloat16(parameters: Any) -> Any:
        return choose(dataclasses.replace(parameters, qkv_dtype=torch.bfloat16))

    utils.get_attention_backend = choose_as_for_bfloat16


def _apex_kernels() -> ModuleType:
    """apex's product that Megatron's output layer accumulates its weight gradient with."""
    module = ModuleType("fused_weight_gradient_mlp_cuda")
    module.__spec__ = ModuleSpec(module.__name__, None)

    def accumulate(inputs: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
        assert len(inputs), "not made for zero rows"
        main_grad.add_(grad.flatten(0, -2).float().t() @ inputs.flatten(0, -2).float())

    module.wgrad_gemm_accum_fp32 = accumulate  # type: ignore[attr-defined]
    return module


def _prepare_platform() -> None:
    """CUDA's settings on the CPU platform, except for grouped sends, which gloo lacks."""
    from megatron_dsrl.platform import current_platform, silence_expected_warnings
    from megatron_dsrl.platform.cpu import CpuPlatform
    from megatron_dsrl.platform.cuda import CudaPlatform

    silence_expected_warnings()
    current_platform().install()
    from megatron_dsrl.model import build

    as_on_cuda, as_on_cpu = CudaPlatform(), CpuPlatform.transformer_config_flags

    def flags(self: CpuPlatform, transformer_engine: bool) -> dict[str, Any]:
        if not transformer_engine:
            return as_on_cpu(self, False)
        return as_on_cuda.transformer_config_flags(True) | {"batch_p2p_comm": False}

    CpuPlatform.transformer_config_flags = flags  # type: ignore[method-assign]
    CpuPlatform.attends_to_packed_rows = True  # type: ignore[assignment]
    # `auto` takes local layers for float32, since the real kernels refuse it.
    build.choose_layer_implementation = lambda wanted, dtype: "local" if wanted == "local" else "transformer_engine"
