"""The machine and the commit that a record is about."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_dsrl.planning.gpus import GPUS, Gpu
from megatron_dsrl.provenance.code import code_of_package
from megatron_dsrl.provenance.start import devices, package_versions, python_version
from megatron_dsrl.provenance.words import device_words

ROOT = Path(__file__).resolve().parents[2]


def describe_machine(commit: str | None = None) -> dict[str, str]:
    """Device, commit, time and versions, by name.

    Args:
        commit: shown if the files are not in a git checkout, for example because only they were copied to the machine.
    """
    found = devices()
    return {
        "device": device_words(found),
        "commit": _commit(commit),
        "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "system": f"{found['system']}, {found['usable_cores']} cores",
        "Python": python_version(),
        **package_versions(),
    }


def known_gpu(names: Sequence[str]) -> Gpu | None:
    """The most specific entry of the planning table for a device name such as `NVIDIA H100 80GB HBM3`; None for an
    unknown device, and for a slice of one (MIG)."""
    words = {word.lower().removesuffix("gb") for name in names for word in name.replace("-", " ").split()}
    fitting = [name for name in GPUS if set(name.split("-")) <= words and "mig" not in words]
    return GPUS[max(fitting, key=lambda name: len(name.split("-")))] if fitting else None


def this_gpu() -> Gpu | None:
    """The entry of the planning table for the first CUDA device; None without one, or if the table lacks it."""
    names: Any = devices()["names"]
    return known_gpu(names[:1])


def _commit(given: str | None) -> str:
    code = code_of_package(ROOT / "megatron_dsrl", "megatron-dsrl")
    if code.commit is None:
        return f"{given}, as given on the command line" if given else f"unknown: {code.reason}"
    return code.commit + (" with changes that are not committed" if code.dirty else "")
