#!/usr/bin/env python3
"""Import in the GPU image everything that computes, each in its own process; needs no GPU.

Metadata cannot tell whether a compiled extension loads, or whether a package swallowed the error of one of its own
imports, as Transformer Engine does. install.sh runs this at the end, so that an image that cannot train is never built.

SGLang's kernels are linked to the driver's library, which a machine without a GPU lacks; the toolkit's stub of it is
enough for an import.
"""

import ctypes
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dsrl.doctor.kernels import import_problem

DRIVER = "libcuda.so.1"


@dataclass(frozen=True)
class Check:
    """A module to import."""

    module: str
    then: str = ""
    """Statement that must not raise; `module` is the imported module."""


CHECKS = (
    Check("torch"),
    Check("transformer_engine.pytorch", "module.optimizers.FusedAdam"),
    Check("megatron.core"),
    Check("megatron.core.extensions.transformer_engine", "assert module.HAVE_TE"),
    Check("megatron.core.models.gpt.gpt_layer_specs", "module.get_gpt_layer_with_transformer_engine_spec()"),
    # apex, whose extensions need torch's libraries in the process.
    Check("apex.optimizers", "module.FusedAdam"),
    Check("amp_C", "module.multi_tensor_scale, module.multi_tensor_l2norm"),
    Check("fused_weight_gradient_mlp_cuda", "module.wgrad_gemm_accum_fp32"),
    Check("sglang"),
    Check("sgl_kernel"),
    Check("flashinfer"),
    Check("torch_memory_saver"),
    Check("megatron_dsrl.actor.actor"),
)


def driver_stub(folder: Path) -> dict[str, str]:
    """Environment variables with which `DRIVER` is found: none with a driver, else the toolkit's stub.

    Args:
        folder: receives a link to the stub under the versioned name, which the stub lacks.
    """
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        stub = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "lib64", "stubs", "libcuda.so")
        (folder / DRIVER).symlink_to(stub)
        inherited = [os.environ["LD_LIBRARY_PATH"]] if os.environ.get("LD_LIBRARY_PATH") else []
        return {"LD_LIBRARY_PATH": os.pathsep.join([str(folder), *inherited])}
    return {}


def main(checks: Sequence[Check] = CHECKS) -> int:
    """Print a line per module; returns the exit status."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        variables = driver_stub(Path(folder))
        for check in checks:
            problem = import_problem(check.module, check.then, variables)
            print(f"{'ok' if problem is None else 'failed':8}{check.module}", flush=True)
            if problem is not None:
                failures += 1
                print(problem, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
