#!/usr/bin/env python3
"""Whether the image's versions still are to be had and fit together, by the package registry; installs nothing.

requirements.lock is resolved anew from requirements.in and pyproject.toml with its own versions as the only choice, by
`uv` (which does not read pip's settings: UV_DEFAULT_INDEX names another registry), and the packages that
are compiled in the image are looked up with pip. What comes from a git repository is not looked up.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIMIT_SECONDS = 300
TARGET = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39", "--prerelease", "allow")


def pins(file: str) -> dict[str, str]:
    """Version by package name of the exact pins in a requirements file of this folder."""
    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def resolve_anew() -> str:
    """What uv makes of the requirements with the lock's versions as the only choice.

    Raises:
        RuntimeError: with uv's explanation, if they do not fit together or are not to be had.
    """
    inputs = [str(FOLDER.parents[1] / "pyproject.toml"), str(FOLDER / "requirements.in")]
    constraints = ["--constraints", str(FOLDER / "requirements.lock")]
    return _run(["uv", "pip", "compile", *inputs, *constraints, *TARGET, "--no-annotate", "--no-header", "-q"])


def versions_on_the_registry(package: str) -> set[str]:
    """All versions that pip finds."""
    shown = _run([sys.executable, "-m", "pip", "index", "versions", package])
    available = re.search(r"^Available versions: (.*)$", shown, re.MULTILINE)
    return set(available.group(1).split(", ")) if available else set()


def problems() -> list[str]:
    """In words; empty if all is well."""
    found = []
    resolved = dict(line.split("==") for line in resolve_anew().splitlines() if "==" in line)
    locked = pins("requirements.lock")
    for name in sorted(locked.keys() | resolved.keys()):
        if locked.get(name) != resolved.get(name):
            found.append(f"{name}: the lock has {locked.get(name)}, the requirements come to {resolved.get(name)}")
    for name, wanted in pins("requirements-source.txt").items():
        if wanted not in versions_on_the_registry(name):
            found.append(f"{name}: {wanted} is not on the registry")
    return found


def _run(command: list[str]) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command[:3])}: {finished.stderr.strip()}")
    return finished.stdout


def main() -> int:
    """Command line; returns the exit status."""
    if shutil.which("uv") is None:
        print("uv is not installed: pip install uv", file=sys.stderr)
        return 2
    found = problems()
    print(*found or [f"{len(pins('requirements.lock'))} wheels fit together; the sources are there"], sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
