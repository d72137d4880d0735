"""System section of `dsrl doctor`: the C library that SGLang's wheels are built for, a C compiler, the sandbox, the
temporary folder and the limit of open files."""

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Mapping

from packaging.version import Version

from megatron_dsrl.common.process import temporary_folder_problem
from megatron_dsrl.doctor.kernels import Finding
from megatron_dsrl.rewards.sandbox_isolation import ADVICE, missing_isolation

OLDEST_GLIBC = "2.34"
"""SGLang's wheels are `manylinux_2_34` only; tools/setup_cpu.sh refuses older ones before it downloads anything."""
FEWEST_OPEN_FILES = 4096
"""A run has a few hundred files open, plus a connection per request to an engine."""


def examine_c_library(library: tuple[str, str] | None = None) -> Finding:
    """Whether SGLang's wheel can be installed here; `library` is what `platform.libc_ver` says if it is None."""
    name, version = library or platform.libc_ver()
    found = f"{name or 'not glibc'} {version}".strip()
    if name == "glibc" and Version(version) >= Version(OLDEST_GLIBC):
        return Finding("C library", "ok", found)
    advice = f"SGLang's wheels need glibc {OLDEST_GLIBC} or newer (Ubuntu 22.04, Debian 12, RHEL 9): use an image"
    return Finding("C library", "problem", found, advice)


def examine_sandbox() -> Finding:
    """Whether programs of the verifier `code` can be isolated here."""
    problem = missing_isolation()
    if problem is None:
        return Finding("sandbox", "ok", "programs of the verifier `code` can be isolated")
    advice = f"the verifier `code` refuses to run here, everything else works. {ADVICE}"
    return Finding("sandbox", "note", f"programs cannot be isolated: {problem}", advice)


def examine_compiler(cuda: bool, environment: Mapping[str, str] = os.environ) -> Finding:
    """A C compiler, with which Triton builds the launchers of its kernels on a GPU."""
    candidates = (environment.get("CC", "gcc"), "cc")
    compiler = next(filter(None, (shutil.which(name, path=environment.get("PATH")) for name in candidates)), None)
    if compiler:
        return Finding("C compiler", "ok", compiler)
    if not cuda:
        return Finding("C compiler", "ok", "none found; not used on CPU")
    return Finding("C compiler", "problem", "none found", "install gcc: Triton needs it for its kernels on the GPU")


def examine_temporary_folder() -> Finding:
    """Whether sockets can be made in the temporary folder."""
    problem = temporary_folder_problem()
    if problem is None:
        return Finding("temporary folder", "ok", tempfile.gettempdir())
    return Finding("temporary folder", "problem", "its name is too long", problem)


def examine_open_files() -> Finding:
    """Whether thousands of requests can be in flight."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= FEWEST_OPEN_FILES:
        return Finding("open files", "ok", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard:,}")
    advice = "requests to the engines wait for each other: raise the limit (`ulimit -Hn`, limits.conf or LimitNOFILE)"
    return Finding("open files", "note", f"at most {hard:,} (hard limit)", advice)
