"""Every shell script of the repository, with what it sources, passes shellcheck without a warning."""

import subprocess

import pytest

from tests.support.linters import complaints
from tests.support.tiny_run import REPOSITORY

FOLDERS = (".ci", "examples", "slurm", "tools")


def scripts() -> list[str]:
    """Paths of all files in these folders that a shell runs, by their first line."""
    files = (file for folder in FOLDERS for file in (REPOSITORY / folder).rglob("*") if file.suffix in ("", ".sh"))
    first_lines = {file: file.open("rb").readline() for file in files if file.is_file()}
    return sorted(str(file.relative_to(REPOSITORY)) for file, line in first_lines.items() if is_for_a_shell(line))


def is_for_a_shell(first_line: bytes) -> bool:
    return first_line.startswith(b"#!") and first_line.rstrip().endswith(b"sh")


@pytest.mark.parametrize("script", scripts())
def test_shellcheck_has_nothing_to_say(script) -> None:
    assert complaints("shellcheck", "--external-sources", script) == ""


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a checkout")
def test_no_script_is_left_out() -> None:
    search = ["git", "grep", "-lE", "^#!.*sh$"]
    found = subprocess.run(search, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    assert set(found.split()) <= set(scripts())


def test_a_variable_that_is_not_quoted_is_found() -> None:
    assert "SC2086" in complaints("shellcheck", "-", text="#!/bin/sh\nls $1\n")
