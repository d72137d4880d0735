"""A recorded start as text: what may affect results, and where and how it ran."""

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from megatron_dsrl.observability.records import Record

SHOWN_DIGITS = 12
"""Digits of hashes to show, enough to tell them apart."""
NOT_RECORDED = "not recorded"
SHORT_NAMES = {
    "tensor_parallel_size": "TP",
    "pipeline_parallel_size": "PP",
    "context_parallel_size": "CP",
    "expert_parallel_size": "EP",
    "virtual_pipeline_stages": "virtual stages",
}


def what_computed(start: Record) -> dict[str, str]:
    """Code, packages, machine, layout, model and data of a start by name: all that may change its results."""
    packages = start.get("packages") or {}
    return {
        "Commit": _words(start, "code", _code),
        "Base model": _words(start, "model", _model),
        "Training data": _words(start, "data", _prompts),
        **{f"Problems of {name}": _prompts(one) for name, one in _mapping(start.get("evaluation_sets")).items()},
        **({"Verifiers": "; ".join(start["verifiers"])} if start.get("verifiers") else {}),
        "Processes": str(start.get("world_size", NOT_RECORDED)),
        "Layout": _words(start, "layout", _layout),
        "Device": _words(start, "device", device_words),
        "Python": _words(start, "python", lambda text: text.partition(" (")[0]),
        **{f"Package {name}": version for name, version in _mapping(packages).items()},
    }


def where_it_ran(start: Record) -> dict[str, str]:
    """Time, host, job and command of a start by name, which differ between any two starts."""
    return {
        "Started": start_time(start),
        "Command line": _words(start, "command_line", shlex.join),
        "In folder": _words(start, "working_folder", str),
        "Hosts": _words(start, "hosts", ", ".join),
        "SLURM": slurm_words(start.get("slurm")),
    }


def start_time(start: Record) -> str:
    """Time of a start, such as `2026-03-01 12:00 UTC`."""
    return start.get("utc", NOT_RECORDED).replace("T", " ")[:16] + (" UTC" if "utc" in start else "")


def commit_words(start: Record) -> str:
    """The commit in short, and whether it was changed."""
    return _words(start, "code", _code)


def device_words(device: Mapping[str, Any]) -> str:
    """Device in words, such as `8 × NVIDIA H100 80GB HBM3, CUDA 13.0, driver 580.95.05` or `CPU, AMD EPYC`."""
    names = device.get("names") or []
    if not names:
        return f"CPU, {device.get('processor')}"
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return f"{kinds}, CUDA {device.get('cuda')}, driver {device.get('driver')}"


def slurm_words(job: Mapping[str, str] | None) -> str:
    """Job, array task and restart count, such as `job 17, task 3, restart 2`."""
    if not job:
        return "none"
    parts = {"job_id": "job", "array_task_id": "task", "restart_count": "restart"}
    said = [f"{word} {job[key]}" for key, word in parts.items() if job.get(key) not in (None, "0")]
    return ", ".join(said)


def _words(start: Record, key: str, describe: Callable[[Any], str]) -> str:
    value = start.get(key)
    if value is None:
        return NOT_RECORDED
    if isinstance(value, dict) and "unknown" in value:
        return f"unknown: {value['unknown']}"
    return describe(value)


def _mapping(value: Any) -> dict[str, Any]:
    """The value, or an empty mapping if it could not be determined."""
    return value if isinstance(value, dict) and "unknown" not in value else {}


def _code(code: Mapping[str, Any]) -> str:
    if not code.get("commit"):
        return f"unknown: {code.get('reason')}"
    changes = f" with changes {_short(code['diff_sha256'])}" if code.get("dirty") else ""
    here = code.get("working_folder")
    custom = f"; current folder: {_code(here)}" if here else ""
    return _short(code["commit"]) + changes + custom


def _model(model: Mapping[str, Any]) -> str:
    commit = f" at {_short(model['hub_commit'])}" if model.get("hub_commit") else ""
    return f"{model.get('path')}{commit}, fingerprint {_short(model.get('fingerprint'))}"


def _prompts(prompts: Mapping[str, Any]) -> str:
    taken = f"{prompts.get('prompts', 0):,} problems"
    return f"{prompts.get('source')}, {taken}, SHA-256 {_short(prompts.get('prompts_sha256'))}"


def _layout(layout: Mapping[str, Any]) -> str:
    sizes = [f"{name} {layout[key]}" for key, name in SHORT_NAMES.items() if layout.get(key, 1) != 1]
    switches = [key.replace("_", " ") for key, value in layout.items() if value is True]
    return ", ".join([*(sizes or ["no model parallelism"]), *switches])


def _short(digest: str | None) -> str:
    return (digest or NOT_RECORDED)[:SHOWN_DIGITS]
