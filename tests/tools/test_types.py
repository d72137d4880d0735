"""The package passes the type checker at the level that pyproject.toml sets."""

import subprocess
import sys

import pytest

from tests.support.tiny_run import REPOSITORY


@pytest.mark.timeout(600)
def test_the_package_passes_the_type_checker() -> None:
    """Incremental: `.mypy_cache` in the checkout holds what the last run found out."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=580)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
