"""The linters that come with the `dev` extra, run as programs."""

import subprocess
import sys
from pathlib import Path

from tests.support.tiny_run import REPOSITORY


def complaints(linter: str, *arguments: str, text: str | None = None) -> str:
    """What `hadolint` or `shellcheck` of this environment says, in the repository; empty if it has nothing to say.

    Args:
        linter: its name; it lies beside the Python that runs the tests.
        arguments: options and files.
        text: standard input, which the argument `-` stands for.
    """
    program = Path(sys.executable).parent / linter
    finished = subprocess.run(
        [program, *arguments], cwd=REPOSITORY, input=text, capture_output=True, text=True, timeout=60
    )
    said = finished.stdout + finished.stderr
    assert bool(said) == bool(finished.returncode), "a status without a word, or a word without a status"
    return said
