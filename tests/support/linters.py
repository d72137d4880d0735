"""The linters that come with the `dev` extra, run as programs."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_run import REPOSITORY


def complaints(linter: str, *arguments: str, text: str | None = None) -> str:
    """What `hadolint`, `shellcheck` or `ruff` of this environment reports in the repository; empty if nothing.

    Args:
        linter: its name; it is installed beside the Python that runs the tests. If it has no wheel (shellcheck on
            aarch64), the one on PATH is used; without one, the test is skipped.
        arguments: options and files.
        text: standard input, read for the argument `-`.
    """
    program = shutil.which(linter, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None and platform.machine() != "x86_64":
        pytest.skip(f"{linter} is not installed, and has no wheel for {platform.machine()}")
    assert program, f"{linter} is missing: bash tools/setup_cpu.sh --dev"
    finished = subprocess.run(
        [program, *arguments], cwd=REPOSITORY, input=text, capture_output=True, text=True, timeout=60
    )
    said = finished.stdout + finished.stderr
    assert bool(said) == bool(finished.returncode), "a status without a word, or a word without a status"
    return said
