"""Run a part in its own process, and read what it reports."""

import os
import shutil
import sysconfig
from pathlib import Path

from tools.gpu_probe.packages import import_problem
from tools.gpu_probe.parts import Part
from tools.gpu_probe.reports import read_reports
from tools.gpu_record.attention_backend import LOGGING, attention_backends
from tools.gpu_record.processes import run_python
from tools.gpu_record.record import Record, Result

LAST_LINES = 30
"""Lines of a failed part's output that belong in the record."""


def run_part(part: Part, record: Record) -> Result:
    """The result of a part: its figures, including those before a failure; or why it was skipped.

    Args:
        part: is run with its arguments for a CPU if the record is about one.
        record: its folder receives the output.
    """
    if part.only_on_gpu and record.on_cpu:
        return Result(part.name, part.measures, "skipped", reason="has no CPU kernels")
    for module in part.needs:
        if (problem := import_problem(module)[1]) is not None:
            return Result(part.name, part.measures, "skipped", reason=f"{module} cannot be imported: {problem}")
    arguments = (*part.arguments, *(part.on_cpu if record.on_cpu else ()))
    variables = {"CUDA_VISIBLE_DEVICES": ""} if record.on_cpu else LOGGING | without_compiler()
    outcome = run_python(arguments, record.folder / f"{part.name}.log", part.limit_minutes * 60, variables)
    lines = outcome.last_lines(10**6)
    figures, problems = read_reports(lines)
    reason = "; ".join(filter(None, (*problems, outcome.problem)))
    return Result(
        part.name,
        part.measures,
        "failed" if reason else "passed",
        seconds=outcome.seconds,
        reason=reason or None,
        figures=figures | attention_backends(lines),
        output=outcome.last_lines(LAST_LINES) if reason or not figures else (),
        command=outcome.command,
    )


def without_compiler() -> dict[str, str]:
    """Environment variables for a machine on which Triton cannot build its launcher: it needs a C compiler and Python's
    headers. Megatron compiles a few small functions with it; without, they run as they are."""
    compilers = filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return {} if any(compilers) and headers.is_file() else {"TORCH_COMPILE_DISABLE": "1"}
