#!/usr/bin/env python3
"""Check without a GPU that what the image compiles fits its torch: build the packages, compile, and link nothing.

    python tools/image/check_sources.py FOLDER... [--only TEXT] [--device]

FOLDER is an unpacked source package of requirements-source.txt: apex's repository, or transformer-engine-torch. pip
builds a copy of it as install.sh does, with a recorder in place of the compilers. What the recorder was called with
names the files, the flags and the include folders that the image's build will use. Every C++ file is then checked with
these (`g++ -fsyntax-only`, up to a minute each); with --device the CUDA files are compiled by nvcc as well, for every
architecture in CUDA_ARCHITECTURES.

Run it in an environment with the lock's torch, setuptools, wheel, ninja and pybind11, and the toolkit in CUDA_HOME.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

IMAGE = Path(__file__).resolve().parent
LIMIT_SECONDS = 900
IN_THE_ENVIRONMENT_OF_THE_BUILD = 'source "$1"; compile_environment; shift; exec "$@"'


@dataclass(frozen=True)
class Compilation:
    """What a build called a compiler with to get an object file."""

    file: Path
    """Source, absolute."""
    compiler: str
    """`g++` or `nvcc`."""
    arguments: list[str]
    folder: str
    """Working directory."""


def compilations(copy: Path, scratch: Path) -> list[Compilation]:
    """Build the package with recorders in place of the compilers.

    Args:
        copy: the unpacked package; the build writes into it.
        scratch: empty folder, which outlives the use of the result.

    Raises:
        SystemExit: with the end of pip's output, if the build fails.
    """
    calls = scratch / "calls"
    calls.mkdir()
    recorders = {name: str(shutil.copy(IMAGE / "record_compiler.py", scratch / name)) for name in ("g++", "nvcc")}
    variables = {"CXX": recorders["g++"], "PYTORCH_NVCC": recorders["nvcc"], "COMPILER_CALLS": str(calls)}
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(scratch)]
    finished = subprocess.run(
        ["bash", "-c", IN_THE_ENVIRONMENT_OF_THE_BUILD, "build", str(IMAGE / "install.sh"), *build, str(copy)],
        env=os.environ | variables | {"DSRL_VENV": sys.prefix},
        capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    if finished.returncode:
        output = (finished.stdout + finished.stderr).strip().splitlines()
        sys.exit("\n".join([f"{copy.name} cannot be built:", *output[-30:]]))
    found = []
    for call in sorted(calls.iterdir()):
        compiler, folder, *arguments = json.loads(call.read_text(encoding="utf-8"))
        sources = [Path(folder, each).resolve() for each in arguments if each.endswith((".cpp", ".cu"))]
        found += [Compilation(file, compiler, arguments, folder) for file in sources]
    return sorted(found, key=lambda each: each.file)


def headers_of_wheels() -> list[Path]:
    """Headers of the CUDA packages that torch brings, for a toolkit that lacks some."""
    (torch,) = importlib.util.find_spec("torch").submodule_search_locations
    return sorted(Path(torch).parent.glob("nvidia/*/include"))


def problem(compilation: Compilation) -> str | None:
    """The beginning of the compiler's output; None if it accepts the file."""
    if compilation.compiler == "nvcc":
        nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
        command = [str(nvcc), *(f"-Xcompiler=-idirafter,{path}" for path in headers_of_wheels())]
    else:
        command = ["g++", "-fsyntax-only", *(f"-idirafter{path}" for path in headers_of_wheels())]
    try:
        finished = subprocess.run(
            [*command, "-w", *compilation.arguments],
            cwd=compilation.folder, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not compiled within {LIMIT_SECONDS} s"
    return None if finished.returncode == 0 else "\n".join(finished.stderr.strip().splitlines()[:12])


def check(package: Path, only: list[str], device: bool, scratch: Path) -> list[Path]:
    """Check a package's files, print a line for each, and return those that the compiler refuses.

    Args:
        package: its unpacked source.
        only: texts; a file is checked if its name contains one of them. Empty: every file.
        device: compile CUDA files as well.
        scratch: empty folder.
    """
    copy, not_copied = scratch.resolve() / package.resolve().name, shutil.ignore_patterns(".git", "build")
    shutil.copytree(package, copy, ignore=not_copied)
    found_compilations = compilations(copy, scratch.resolve())
    # Transformer Engine's set-up removes its headers at the end.
    shutil.copytree(package, copy, ignore=not_copied, dirs_exist_ok=True)
    refused, left_out = [], 0
    for compilation in found_compilations:
        name = compilation.file.relative_to(copy)
        if (only and not any(text in name.name for text in only)) or (compilation.compiler == "nvcc" and not device):
            left_out += 1
            continue
        found = problem(compilation)
        print(f"{'ok' if found is None else 'failed':8}{name}", flush=True)
        if found is not None:
            print(found, flush=True)
            refused.append(name)
    print(f"{package.name}: {len(refused)} refused, {left_out} left out", flush=True)
    return refused


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--device", action="store_true", help="compile CUDA files too")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="files whose name contains this; may be repeated"
    )
    options = parser.parse_args()
    refused = []
    for folder in options.folders:
        if not (folder / "setup.py").is_file():
            print(f"{folder} is not an unpacked source package: it has no setup.py", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as scratch:
            refused += check(folder, options.only, options.device, Path(scratch))
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
