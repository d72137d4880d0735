"""Check what is installed, which device and kernels are available, what is missing and how to fix it: `dsrl doctor`.

Every check gives a Finding. `ok` is fine, `note` is worth knowing (a run works without it), `problem` prevents every
run. Packages are looked up by their metadata, not imported: importing SGLang takes many seconds, and a broken CUDA
extension must not end the examination. Transformer Engine, whose failures would end every run, is imported in a
separate process.
"""

import dataclasses
import json
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from megatron_dsrl.common.cpu_threads import has_bfloat16
from megatron_dsrl.common.temporary_folder import temporary_folder_problem
from megatron_dsrl.doctor.device import driver_version, examine_cuda_compiler, examine_device
from megatron_dsrl.doctor.kernels import Finding, examine_kernels, installed_version
from megatron_dsrl.rewards.sandbox_isolation import ADVICE, missing_isolation

if TYPE_CHECKING:
    from megatron_dsrl.platform import DeviceInventory


REPOSITORY = Path(__file__).resolve().parents[2]
LOCK_FILES = ("tools/requirements-cpu.lock", "tools/requirements-cpu-no-deps.lock")
IMAGE_LOCK_FILE = "tools/image/requirements.lock"
ESSENTIAL_PACKAGES = (
    "torch", "megatron-core", "sglang", "transformers", "datasets", "safetensors", "pydantic", "PyYAML", "Pebble",
    "math-verify", "aiohttp", "tensorboard", "rich", "Jinja2",
)  # fmt: skip
SET_UP = "run `bash tools/setup_cpu.sh` (CPU), or on a GPU machine use the image or tools/image/install.sh"
SMALLEST_SHARED_MEMORY = 1 << 30
"""Bytes; weights go to the engine through shared memory in buckets. Containers often start with 64 MiB."""

SMALLEST_MEMORY = 6 << 30
"""Bytes; a tiny CPU run takes about 4 GiB: the trainer, the engine and its scheduler."""

OLDEST_GLIBC = "2.34"
"""SGLang's wheels are `manylinux_2_34` only; tools/setup_cpu.sh refuses older ones before it downloads anything."""
FEWEST_OPEN_FILES = 4096
"""A run has a few hundred files open, plus a connection per request to an engine."""


@dataclass(frozen=True)
class Examination:
    """All findings about this machine."""

    findings: tuple[Finding, ...]

    @property
    def can_run(self) -> bool:
        """Whether a CPU or GPU run is possible."""
        return all(finding.severity != "problem" for finding in self.findings)


def examine() -> Examination:
    """Look at this machine and the Python environment of this process; changes nothing."""
    torch = installed_version("torch")
    inventory = None
    if torch is not None:
        from megatron_dsrl.platform import take_inventory  # imports torch

        inventory = take_inventory()
    cuda = inventory is not None and inventory.platform == "cuda"
    torch_cuda = inventory.torch_cuda_version if inventory else None
    environment, lock_files = pinned_environment(torch, torch_cuda)
    packages = tuple(_packages(read_pins(REPOSITORY / name for name in lock_files), environment))
    return Examination((
        _python(),
        examine_c_library(),
        *packages,
        *(_torchvision() if inventory else ()),
        *(_devices(inventory) if inventory else ()),
        *examine_kernels(cuda, torch_cuda),
        examine_compiler(cuda),
        examine_sandbox(),
        _processor(),
        _memory(),
        _shared_memory(Path("/dev/shm")),
        examine_temporary_folder(),
        examine_open_files(),
        _ports(),
    ))  # fmt: skip


def pinned_environment(torch: str | None, torch_cuda: str | None) -> tuple[str, tuple[str, ...]]:
    """Description of this environment and its lock files, found by the installed torch's pin.

    Whether torch is built for CUDA does not decide: the CPU environment may have such a build too (tools/setup_cpu.sh),
    and the image stays the image on a machine without a GPU, where checkpoints are converted. `torch` is the installed
    version, `torch_cuda` the CUDA version it was built for.
    """
    pinned = read_pins(REPOSITORY / name for name in LOCK_FILES).get("torch")
    is_pinned = torch is not None and torch.partition("+")[0] == pinned
    if torch_cuda is None or is_pinned:
        return "CPU environment is tested", LOCK_FILES
    return "GPU image is made", (IMAGE_LOCK_FILE,)


def read_pins(lock_files: Iterable[Path]) -> dict[str, str]:
    """Pinned version by normalised package name; empty outside a checkout, since only a checkout has the lock files."""
    lines = [line for file in lock_files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {
        canonicalize_name(requirement.name): next(iter(requirement.specifier)).version for requirement in requirements
    }


def print_for_people(examination: Examination, console: Console | None = None) -> None:
    """A table of the findings, then what to do, then the verdict."""
    console = console or Console()
    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table("", "what", "found", box=None, header_style="bold")
    for finding in examination.findings:
        colour = colours[finding.severity]
        table.add_row(f"[{colour}]{finding.severity}[/]", finding.topic, finding.found)
    console.print(table)
    for finding in examination.findings:
        if finding.advice:
            colour = colours[finding.severity]
            console.print(f"[{colour}]{finding.severity}[/]: {finding.topic}: {finding.advice}", soft_wrap=True)
    verdict = "A run is possible here." if examination.can_run else "Fix the problems above before you run."
    console.print(f"\n{verdict}", style="bold")


def print_as_json(examination: Examination) -> None:
    """Print the result as one JSON object on stdout."""
    findings = [dataclasses.asdict(finding) for finding in examination.findings]
    print(json.dumps({"can_run": examination.can_run, "findings": findings}, indent=2))


def _python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable})"
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("Python", "ok", found)
    return Finding("Python", "problem", found, "use 3.11 or 3.12: DSRL_PYTHON=python3.12 bash tools/setup_cpu.sh")


def _packages(pins: dict[str, str], environment: str) -> Iterator[Finding]:
    for name in ESSENTIAL_PACKAGES:
        installed, pinned = installed_version(name), pins.get(canonicalize_name(name))
        if installed is None:
            yield Finding(name, "problem", "not installed", SET_UP)
        elif pinned and installed.partition("+")[0] != pinned:
            advice = f"the {environment} with {pinned}; to get it, {SET_UP}"
            yield Finding(name, "note", f"{installed}, not the pinned {pinned}", advice)
        else:
            yield Finding(name, "ok", installed)


def _torchvision() -> Iterator[Finding]:
    """Not needed, but if it is installed, Transformers imports it, and fails if it does not match torch."""
    installed = installed_version("torchvision")
    if installed is None:
        return
    try:
        import_module("torchvision")
    except Exception as error:  # a missing operator is a RuntimeError, a missing library an OSError or ImportError
        advice = "it does not fit the installed torch and breaks Transformers: pip uninstall torchvision"
        yield Finding("torchvision", "problem", f"{installed}, cannot be imported: {error}", advice)
    else:
        yield Finding("torchvision", "ok", installed)


def _devices(inventory: "DeviceInventory") -> Iterator[Finding]:
    names, torch_cuda = inventory.names, inventory.torch_cuda_version
    yield examine_device(names, torch_cuda, driver_version(), os.environ)
    if names and torch_cuda is not None:
        yield examine_cuda_compiler(torch_cuda)


def _processor() -> Finding:
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count()
    bfloat16 = "with" if has_bfloat16() else "without"
    return Finding("CPU cores", "ok", f"{usable} usable of {total}, {bfloat16} bfloat16 instructions")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{_gibibytes(memory.available)} available of {_gibibytes(memory.total)}"
    if memory.available >= SMALLEST_MEMORY:
        return Finding("memory", "ok", found)
    advice = f"a tiny CPU run takes about {_gibibytes(SMALLEST_MEMORY)}; end other programs or use a larger machine"
    return Finding("memory", "note", found, advice)


def _shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        advice = "mount a tmpfs there: torch shares tensors between processes through it"
        return Finding("shared memory", "problem", f"{folder} does not exist", advice)
    usage = shutil.disk_usage(folder)
    found = f"{_gibibytes(usage.free)} free of {_gibibytes(usage.total)} in {folder}"
    if usage.free >= SMALLEST_SHARED_MEMORY:
        return Finding("shared memory", "ok", found)
    return Finding(
        "shared memory",
        "note",
        found,
        "weights go to the engines through it: give the container more (docker run --shm-size=16g), or lower "
        "engine.weight_bucket_megabytes well below it",
    )


def _ports() -> Finding:
    """Whether this process may listen on a free local port and be reached there, as the engines must."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                server.accept()[0].close()
    except OSError as error:
        advice = "the engines listen on 127.0.0.1; allow local TCP connections for this user"
        return Finding("local ports", "problem", f"cannot listen on 127.0.0.1 and connect to it: {error}", advice)
    return Finding("local ports", "ok", f"can listen on 127.0.0.1 and connect to it (tried port {port})")


def _gibibytes(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def examine_c_library(library: tuple[str, str] | None = None) -> Finding:
    """Whether SGLang's wheel can be installed here; `library` None means what `platform.libc_ver` returns."""
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
    advice = f"the verifier `code` refuses to run here; everything else works. {ADVICE}"
    return Finding("sandbox", "note", f"programs cannot be isolated: {problem}", advice)


def examine_compiler(cuda: bool, environment: Mapping[str, str] = os.environ) -> Finding:
    """A C compiler, which Triton needs to build the launchers of its kernels on a GPU."""
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
    return Finding("temporary folder", "problem", "cannot be used", problem)


def examine_open_files() -> Finding:
    """Whether thousands of requests can be in flight."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= FEWEST_OPEN_FILES:
        return Finding("open files", "ok", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard:,}")
    advice = "requests to the engines wait for each other: raise the limit (`ulimit -Hn`, limits.conf or LimitNOFILE)"
    return Finding("open files", "note", f"at most {hard:,} (hard limit)", advice)
