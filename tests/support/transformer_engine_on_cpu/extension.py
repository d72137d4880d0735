"""The compiled module `transformer_engine_torch`, limited to what a dense or mixture-of-experts Qwen3 needs.

Enumerations have the members of the real ones (csrc/extensions/pybind.cpp and common/util/pybind_helper.h of the source
package). A kernel that has no PyTorch version here can be imported, but raises when it is called.
"""

from enum import IntEnum
from types import ModuleType
from typing import Any, NoReturn

from tests.support.transformer_engine_on_cpu import attention, context_parallel, dense, optimizer, rope

NAME = "transformer_engine_torch"
CUDNN_VERSION = 92400
"""9.24.0, as pinned for the image."""

MEMBERS = {
    "DType": ("kByte kInt16 kInt32 kInt64 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat8E8M0 kFloat4E2M1"),
    "NVTE_Bias_Type": "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI",
    "NVTE_Mask_Type": (
        "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK NVTE_CAUSAL_BOTTOM_RIGHT_MASK "
        "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK"
    ),
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX",
    "NVTE_QKV_Format": (
        "NVTE_BSHD NVTE_SBHD NVTE_THD NVTE_SBHD_2BSHD NVTE_BSHD_2SBHD NVTE_THD_2BSHD NVTE_THD_2SBHD NVTE_BHSD "
        "NVTE_QKV_Format_NOT_SET"
    ),
    "NVTE_QKV_Layout": (
        "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD NVTE_BSH3D "
        "NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D "
        "NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD "
        "NVTE_Paged_KV_BSHD_BSHD_BSHD NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD "
        "NVTE_Paged_KV_SBHD_SBHD_SBHD NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD NVTE_BHSD_BHSD_BHSD "
        "NVTE_QKV_Layout_NOT_SET"
    ),
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8",
    "NVTEScalingMode": (
        "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D NVTE_BLOCK_SCALING_2D "
        "NVTE_NVFP4_1D_SCALING NVTE_INVALID_SCALING"
    ),
    "Float8BlockScaleTensorFormat": "GEMM_READY COMPACT INVALID",
    "NVTERoutingMapFormat": "BYTEMAP BITMAP_U8",
    "NVTEQBHistogramMode": "TWO_KERNEL FUSED_ATOMIC",
    "CommOverlapType": "RS AG",
    "CommOverlapAlgo": (
        "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS SPLIT_PIPELINED_RS_P2P "
        "ATOMIC_GEMM_RS ATOMIC_GEMM_AG_P2P ATOMIC_GEMM_RS_P2P EXTERNAL_BULK_OVERLAP_AG"
    ),
    "FP8FwdTensors": (
        "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT "
        "GEMM3_OUTPUT"
    ),
    "FP8BwdTensors": "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
}
"""Members of the enumerations, in order."""

OTHER_NORMS = ("layernorm_bwd", "layernorm_fwd", "rmsnorm_bwd_add")
"""Without a PyTorch version, but in tables of functions that `from transformer_engine_torch import *` fills."""

LEFT_OUT = {"DType": ("kInt16", "kInt64", "kFloat8E8M0")}
"""Values of the C++ enumeration that Python does not see."""


def make_extension() -> ModuleType:
    """The module, to be put into `sys.modules`."""
    module = _Extension(NAME)
    for name, members in MEMBERS.items():
        values = {member: value for value, member in enumerate(members.split()) if member not in LEFT_OUT.get(name, ())}
        setattr(module, name, IntEnum(name, values))
    module.get_cudnn_version = lambda: CUDNN_VERSION
    module.get_cublasLt_version = lambda: 130101
    module.get_num_cublas_streams = lambda: 4
    for kernels in (attention, context_parallel, dense, optimizer, rope):
        for name in kernels.__all__:
            setattr(module, name, getattr(kernels, name))
    for name in OTHER_NORMS:
        setattr(module, name, getattr(module, name))
    module.get_fused_attn_backend = lambda parameters: (
        module.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen,
        "a PyTorch version",
    )
    return module


class _Extension(ModuleType):
    """A module in which every name can be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(f"transformer_engine_torch.{name} has no PyTorch version in the tests")

        # A class, since some of these names are types in annotations.
        return type(name, (), {"__new__": refuse})
