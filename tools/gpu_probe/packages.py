"""Which packages can be imported here, each tried in its own process: a broken extension may crash it."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial

from tools.gpu_probe.reports import Figures, measure_each

TRIED = (
    "triton", "megatron.core", "transformer_engine.pytorch", "amp_C", "fused_weight_gradient_mlp_cuda", "flash_attn",
    "transformers", "sglang", "sglang.srt.weight_sync.tensor_bucket", "sgl_kernel", "flashinfer",
    "torch_memory_saver",
)  # fmt: skip
"""`amp_C` and `fused_weight_gradient_mlp_cuda` are NVIDIA apex's."""
SECONDS = 120
FOUND = "@version "


def import_problem(module: str) -> tuple[str, str | None]:
    """Version of a module (empty if it has none), and why it cannot be imported; None if it can."""
    program = f"import importlib; m = importlib.import_module({module!r}); " \
              f"print({FOUND!r} + str(getattr(m, '__version__', '')))"  # fmt: skip
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "", f"its import took more than {SECONDS} s"
    said = [line for line in done.stdout.splitlines() if line.startswith(FOUND)]
    if done.returncode == 0 and said:
        return said[-1].removeprefix(FOUND), None
    return "", (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _tried(module: str) -> Figures:
    version, problem = import_problem(module)
    return {f"import {module}": problem or f"works {version}".rstrip()}


if __name__ == "__main__":
    measurements: dict[str, Callable[[], Figures]] = {f"import {module}": partial(_tried, module) for module in TRIED}
    sys.exit(measure_each(measurements))
