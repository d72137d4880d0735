#!/usr/bin/env python3
"""Check with the package registry that the image's pinned versions are available and compatible; installs nothing.

requirements.lock is resolved again from requirements.in and pyproject.toml with its own versions as the only choice, by
`uv` (which does not read pip's settings: UV_DEFAULT_INDEX names another registry). The packages that are compiled in
the image are looked up with pip, and what they declare must be in the lock, since they are installed without
dependencies. What comes from a git repository is not looked up.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = Path(__file__).resolve().parent
LIMIT_SECONDS = 300
TARGET = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39", "--prerelease", "allow")


def pins(file: str) -> dict[str, str]:
    """Version by package name of the exact pins in a requirements file of this folder."""
    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def resolve() -> str:
    """Resolve the requirements with uv, constrained to the lock's versions.

    Raises:
        RuntimeError: with uv's explanation, if they are incompatible or cannot be found.
    """
    inputs = [str(FOLDER.parents[1] / "pyproject.toml"), str(FOLDER / "requirements.in")]
    constraints = ["--constraints", str(FOLDER / "requirements.lock")]
    return _run(["uv", "pip", "compile", *inputs, *constraints, *TARGET, "--no-annotate", "--no-header", "-q"])


def versions_on_the_registry(package: str) -> set[str]:
    """All versions that pip finds."""
    shown = _run([sys.executable, "-m", "pip", "index", "versions", package])
    available = re.search(r"^Available versions: (.*)$", shown, re.MULTILINE)
    return set(available.group(1).split(", ")) if available else set()


def declared_requirements(package: str, version: str) -> list[Requirement]:
    """`Requires-Dist` of a source package on the registry.

    pip unpacks it and runs its set-up, which may fail here without a compiler; the archive has the metadata either way.

    Raises:
        RuntimeError: with what pip said, if it did not unpack the package.
    """
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--no-clean", "--no-deps", "--no-build-isolation"]
        finished = subprocess.run(
            [*download, "--no-binary", ":all:", "--dest", folder, f"{package}=={version}"],
            env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
        files = list(Path(folder).glob("pip-*/*/PKG-INFO"))
        if not files:
            raise RuntimeError(f"{package}=={version}: {finished.stderr.strip()}")
        metadata = HeaderParser().parsestr(files[0].read_text(encoding="utf-8"))
    return [Requirement(line) for line in metadata.get_all("Requires-Dist") or ()]


def missing_requirements(declared: Iterable[Requirement], locked: Mapping[str, str]) -> list[str]:
    """The requirements in `declared` that the locked versions do not meet, as in the metadata; without extras.

    Args:
        declared: requirements of a package that is installed without dependencies.
        locked: version by normalised package name.
    """
    missing = []
    for requirement in declared:
        version = locked.get(canonicalize_name(requirement.name))
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": "", "python_version": "3.12"})
        if applies and (version is None or not requirement.specifier.contains(version, prereleases=True)):
            missing.append(str(requirement))
    return missing


def problems() -> list[str]:
    """Descriptions of all problems; empty if all is well."""
    found = []
    resolved = dict(line.split("==") for line in resolve().splitlines() if "==" in line)
    locked = pins("requirements.lock")
    for name in sorted(locked.keys() | resolved.keys()):
        if locked.get(name) != resolved.get(name):
            found.append(f"{name}: the lock has {locked.get(name)}, the requirements come to {resolved.get(name)}")
    for name, wanted in pins("requirements-source.txt").items():
        if wanted not in versions_on_the_registry(name):
            found.append(f"{name}: {wanted} is not on the registry")
            continue
        for requirement in missing_requirements(declared_requirements(name, wanted), locked):
            found.append(f"{name} is installed without dependencies and declares {requirement}: add it to the lock")
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
