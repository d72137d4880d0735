#!/usr/bin/env python3
"""Check without a GPU that what the image compiles fits its torch: compile the sources, link nothing.

    python tools/image/check_sources.py FOLDER... [--device]

FOLDER is an unpacked source package of requirements-source.txt: apex's repository, or transformer-engine-torch. Host
code is only checked (`g++ -fsyntax-only`, a minute per file at most). With --device the CUDA code of the extensions
that install.sh builds is compiled by nvcc as well, for one architecture. Run it in an environment with the lock's
torch: its headers, and those of the CUDA packages that it brings, are the ones that count.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

LIMIT_SECONDS = 900
ARCHITECTURE = "sm_90"
CXX_STANDARD = "-std=c++20"
"""What torch.utils.cpp_extension of torch 2.14 adds; neither package passes another."""
APEX = {
    "apex_C": ["csrc/flatten_unflatten.cpp"],
    "amp_C": ["csrc/amp_C_frontend.cpp", "csrc/multi_tensor_*.cu", "csrc/update_scale_hysteresis.cu"],
    "fused_weight_gradient_mlp_cuda": ["csrc/megatron/fused_weight_gradient_dense*"],
    "syncbn": ["csrc/syncbn.cpp", "csrc/welford.cu"],
    "fused_layer_norm_cuda": ["csrc/layer_norm_cuda*"],
    "mlp_cuda": ["csrc/mlp*"],
    "fused_dense_cuda": ["csrc/fused_dense*"],
    "masked softmax and rotary embedding": ["csrc/megatron/*masked_softmax*.c*", "csrc/megatron/fused_rotary*.c*"],
}
"""Files by extension of APEX_CPP_EXT=1 and APEX_CUDA_EXT=1 (apex's setup.py)."""
TRANSFORMER_ENGINE = ["csrc/**/*.cpp"]
"""Its torch part is host code only."""
TRANSFORMER_ENGINE_HEADERS = ["common_headers", "common_headers/common", "common_headers/common/include", "csrc"]


def sources(folder: Path) -> Iterator[Path]:
    """Files that install.sh compiles of a package, each once.

    Raises:
        SystemExit: the folder holds neither package.
    """
    if (folder / "csrc" / "amp_C_frontend.cpp").is_file():
        patterns = [pattern for each in APEX.values() for pattern in each]
    elif (folder / "common_headers").is_dir():
        patterns = TRANSFORMER_ENGINE
    else:
        sys.exit(f"{folder} is neither apex's repository nor an unpacked transformer-engine-torch")
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    yield from sorted(file for file in found if file.suffix in (".cpp", ".cu"))


def include_folders(folder: Path) -> list[Path]:
    """Headers of the package, of torch, of the CUDA packages that it brings, of CUDA_HOME, and of Python."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    packages = Path(torch.__file__).parents[1]
    torch_headers = [packages / "torch" / "include", packages / "torch" / "include/torch/csrc/api/include"]
    own = [folder / name for name in (*TRANSFORMER_ENGINE_HEADERS, "csrc") if (folder / name).is_dir()]
    of_packages = sorted(packages.glob("nvidia/*/include"))
    toolkit = [Path(CUDA_HOME) / "include"] if CUDA_HOME else []  # the packages lack crt/, which belongs to nvcc
    return [*own, *torch_headers, *of_packages, *toolkit, Path(sysconfig.get_path("include"))]


def problem(file: Path, folder: Path, output: Path) -> str | None:
    """The end of what the compiler says; None if it accepts the file.

    Args:
        file: `.cpp` or `.cu`.
        folder: the package that it belongs to.
        output: receives the object file of a `.cu`.
    """
    includes = [f"-I{path}" for path in include_folders(folder)]
    common = [CXX_STANDARD, *includes, f"-DTORCH_EXTENSION_NAME={file.stem}", "-DUSE_C10D_NCCL"]
    if file.suffix == ".cpp":
        command = ["g++", "-fsyntax-only", "-w", "-fPIC", *common, str(file)]
    else:
        options = ["-c", "-w", "-O1", f"-arch={ARCHITECTURE}", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
        command = ["nvcc", *options, *common, str(file), "-o", str(output)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"not compiled within {LIMIT_SECONDS} s"
    return None if finished.returncode == 0 else "\n".join(finished.stderr.strip().splitlines()[:12])


def main() -> int:
    """Command line: a line per file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--device", action="store_true", help="compile CUDA code too; needs nvcc")
    parser.add_argument("--only", default="", metavar="TEXT", help="files whose name contains this")
    options = parser.parse_args()
    compilers = {"g++": True, "nvcc": options.device}
    missing = [name for name, needed in compilers.items() if needed and shutil.which(name) is None]
    if missing:
        print(f"not found: {', '.join(missing)}", file=sys.stderr)
        return 2
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        for folder in options.folders:
            for file in sources(folder):
                if options.only not in file.name or (file.suffix == ".cu" and not options.device):
                    continue
                found = problem(file, folder, Path(scratch, "object.o"))
                failures += found is not None
                print(f"{'ok' if found is None else 'failed':8}{file.relative_to(folder)}", flush=True)
                if found is not None:
                    print(found, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
