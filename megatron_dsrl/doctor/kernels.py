"""GPU software section of `dsrl doctor`: fused kernels and SGLang's own, and whether they are compatible.

Transformer Engine and apex are optional, and on CPU they are neither needed nor used. On a GPU a missing one is a note;
an incompatible one is reported with its effect, since most fail late or are silently left out.
tools/image/requirements*.{in,txt} have the versions that work together, and why.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

Severity = Literal["ok", "note", "problem"]
BUILT_FOR_SGLANG = ("torch", "sglang-kernel", "flashinfer-python", "transformers")
"""Packages that sglang's metadata pins and requires on a GPU."""
NEWEST_FLASH_ATTENTION = "2.8.3"
"""Newest release of flash attention 2 that Transformer Engine 2.20 accepts."""
IMPORT_LIMIT_SECONDS = 600
COMPILE = "compile it as tools/image/install.sh does, or use the image"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    topic: str
    """The subject of the check, such as `torch` or `shared memory`."""
    severity: Severity
    found: str
    advice: str = ""
    """What to do about it; empty when nothing needs doing."""


def installed_version(name: str) -> str | None:
    """Version of an installed package, from its metadata; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def import_problem(module: str, then: str = "", variables: Mapping[str, str] | None = None) -> str | None:
    """Import a module in a new process; None if it works, otherwise the end of the traceback, or the signal that ended
    the process. Metadata cannot tell whether a compiled extension loads: it may miss a symbol, which is an error of the
    import, or crash the interpreter.

    Args:
        then: statement that must not raise; `module` is the imported module.
        variables: added to the environment.
    """
    # torch first: extensions are linked to its libraries without saying where they are.
    code = f"import importlib, torch; module = importlib.import_module({module!r}); {then}"
    command = [sys.executable, "-c", code]
    environment = os.environ | dict(variables or {})
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_LIMIT_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not imported within {IMPORT_LIMIT_SECONDS} s"
    if finished.returncode == 0:
        return None
    lines = finished.stderr.strip().splitlines()[-8:]
    if finished.returncode < 0:
        lines.append(f"its import was killed by {signal.Signals(-finished.returncode).name}")
    return "\n".join(lines)


def examine_kernels(
    cuda: bool,
    torch_cuda: str | None,
    installed: Callable[[str], str | None] = installed_version,
    import_problem: Callable[[str], str | None] = import_problem,
) -> Iterator[Finding]:
    """Check every package. `torch_cuda` is the CUDA version that torch was built for; None for the CPU build."""
    yield _transformer_engine(cuda, torch_cuda, installed, import_problem)
    yield _apex(cuda)
    yield from _flash_attention(installed)
    yield from _what_a_run_takes(cuda, installed)
    yield from _sglang_kernels(cuda, installed)
    if cuda:
        yield from _what_sglang_fixes(installed)
        yield from _flash_attention_4(installed)


def _transformer_engine(
    cuda: bool,
    torch_cuda: str | None,
    installed: Callable[[str], str | None],
    import_problem: Callable[[str], str | None],
) -> Finding:
    """Whether its parts match, and whether it can be imported."""
    topic, torch_part = "Transformer Engine", installed("transformer-engine-torch")
    found = torch_part or installed("transformer-engine")
    if found is None:
        return _optional(topic, None, cuda, COMPILE)
    misfit = _transformer_engine_misfit(cuda, torch_cuda, installed)
    if misfit is not None:
        return Finding(topic, "problem", *misfit)
    problem = import_problem("transformer_engine.pytorch")
    if problem is not None:
        reason = problem.splitlines()[-1]
        if torch_part is None:
            found = f"{found}, without its torch part"
        return Finding(
            topic, "problem", f"{found}, cannot be imported: {reason}",
            f"Megatron imports it and fails with it: {COMPILE}, or remove its packages (pip list | grep transformer)",
        )  # fmt: skip
    return Finding(topic, "ok", found)


def _transformer_engine_misfit(
    cuda: bool, torch_cuda: str | None, installed: Callable[[str], str | None]
) -> tuple[str, str] | None:
    """A mismatch of its core, its torch part and torch, and what to do; None if they match."""
    torch_part = installed("transformer-engine-torch")
    if not cuda or torch_part is None:
        return None
    major = (torch_cuda or "").partition(".")[0]
    core = {number: installed(f"transformer-engine-cu{number}") for number in ("12", "13")}
    if core.get(major) is None and any(core.values()):
        other = next(number for number, version in core.items() if version)
        return (
            f"{torch_part}, but its core is for CUDA {other} and torch for CUDA {torch_cuda}",
            f"its kernels will not load: pip install transformer-engine-cu{major}=={torch_part}",
        )
    if core.get(major) not in (None, torch_part):
        return (
            f"core {core[major]}, torch part {torch_part}",
            f"both must be from one release: pip install transformer-engine-cu{major}=={torch_part}",
        )
    return None


def _flash_attention(installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """Transformer Engine attends to packed rows with cuDNN, and with this package on GPUs older than Hopper."""
    topic, found = "flash attention 2", installed("flash-attn")
    if found is None:
        return
    if installed("transformer-engine-torch") and Version(found) > Version(NEWEST_FLASH_ATTENTION):
        yield Finding(
            topic, "note", f"{found}, newer than the {NEWEST_FLASH_ATTENTION} that Transformer Engine 2.20 takes",
            "it is ignored, which only matters on an A100: the trainer uses local layers there",
        )  # fmt: skip
    else:
        yield Finding(topic, "ok", found)


def _flash_attention_4(installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """It is installed in flash_attn/cute, where flash-attn puts a stub if it is installed later."""
    found, package = installed("flash-attn-4"), find_spec("flash_attn")
    if found is None:
        return
    folders = [Path(folder) for folder in (package.submodule_search_locations or ())] if package else []
    if any((folder / "cute" / "interface.py").is_file() for folder in folders):
        yield Finding("flash attention 4 (SGLang's)", "ok", found)
    else:
        yield Finding(
            "flash attention 4 (SGLang's)", "note", f"{found}, but flash_attn/cute is not its own",
            "flash-attn was installed over it: pip install --force-reinstall --no-deps flash-attn-4==" + found,
        )  # fmt: skip


def _sglang_kernels(cuda: bool, installed: Callable[[str], str | None]) -> Iterator[Finding]:
    topic = "SGLang's kernels (sgl_kernel)"
    found = installed("sglang-kernel") or installed("sgl-kernel")
    if cuda and found is None:
        yield Finding(
            topic, "problem", "not installed",
            "SGLang cannot run on a GPU without it: pip install sglang-kernel, or use the image. In the environment of "
            "tools/setup_cpu.sh run on the CPU: export CUDA_VISIBLE_DEVICES=",
        )  # fmt: skip
    else:
        yield _optional(topic, found, cuda, "")


def _what_sglang_fixes(installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """Its kernels are compiled against one version of torch and fail to load with others."""
    sglang = installed("sglang")
    for name, wanted in exact_requirements("sglang", BUILT_FOR_SGLANG).items() if sglang else ():
        found = installed(name)
        if found is not None and found.partition("+")[0] != wanted:
            yield Finding(
                f"{name} for sglang", "problem" if name == "torch" else "note",
                f"{found}, but sglang {sglang} requires {wanted}",
                f"its kernels may fail to load or compute wrong results: pip install {name}=={wanted}",
            )  # fmt: skip


def exact_requirements(package: str, names: tuple[str, ...]) -> dict[str, str]:
    """Versions that an installed package pins these names to with `==`; empty if it is not installed."""
    try:
        requirements = [Requirement(line) for line in requires(package) or ()]
    except PackageNotFoundError:
        return {}
    fixed = {}
    for requirement in requirements:
        name = requirement.name.replace("_", "-")
        specifiers = list(requirement.specifier)
        if name in names and requirement.marker is None and len(specifiers) == 1 and specifiers[0].operator == "==":
            fixed[name] = specifiers[0].version
    return fixed


def _apex(cuda: bool) -> Finding:
    if _is_nvidia_apex() and find_spec("amp_C"):
        return Finding("NVIDIA apex", "ok", "installed, with its CUDA kernels")
    if _is_nvidia_apex():
        advice = "rebuild it with its C++ and CUDA extensions" if cuda else ""
        return Finding("NVIDIA apex", "note", "installed without its CUDA kernels (amp_C)", advice)
    if find_spec("apex"):
        return Finding(
            "NVIDIA apex",
            "note",
            "a package called apex is installed, but it is not NVIDIA's",
            "the `apex` of PyPI is an unrelated web toolkit: pip uninstall apex. NVIDIA's has to be built from source",
        )
    return _optional("NVIDIA apex", None, cuda, f"it is not on PyPI; {COMPILE}")


def _is_nvidia_apex() -> bool:
    # Looked up on disk: asking for the submodule's spec would import its parent.
    apex = find_spec("apex")
    folders = apex.submodule_search_locations or () if apex else ()
    return any((Path(folder) / "multi_tensor_apply").is_dir() for folder in folders)


def _what_a_run_takes(cuda: bool, installed: Callable[[str], str | None]) -> Iterator[Finding]:
    """`model.layer_spec: auto` and Megatron's own choice of Adam, which is the first of three that can be imported."""
    has_engine = installed("transformer-engine") is not None and installed("transformer-engine-torch") is not None
    layers = "Transformer Engine's, with its attention and norms" if cuda and has_engine else (
        "local: PyTorch's scaled_dot_product_attention and RMSNorm"
    )  # fmt: skip
    yield Finding("layers by model.layer_spec=auto", "ok", layers)
    if has_engine:
        adam = "Transformer Engine's FusedAdam"
    elif _is_nvidia_apex() and find_spec("amp_C"):
        adam = "apex's FusedAdam"
    else:
        adam = "PyTorch's AdamW"
    yield Finding("optimizer by Megatron's choice", "ok", adam)


def _optional(topic: str, found: str | None, cuda: bool, remedy: str) -> Finding:
    if found is not None:
        return Finding(topic, "ok", found)
    if not cuda:
        return Finding(topic, "ok", "not installed; not used on CPU")
    return Finding(topic, "note", "not installed; runs are slower without it", remedy)
