"""The installed packages' metadata agree, except for what the lock file explains."""

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
LOCK = REPOSITORY / "tools" / "requirements-cpu-no-deps.lock"
DISAGREEMENT = re.compile(r"^The package `(\S+)` requires `([^`]+)`, but (it's not|`\S+` is) installed$", re.MULTILINE)
OTHER_PYTHON = re.compile(r"^The package `(\S+)` requires Python ", re.MULTILINE)
DECLARES_PYTHON_312 = {"megatron-core", "megatron-dsrl"}
"""Both run on 3.11 as well, where tools/setup_cpu.sh has pip overlook it."""


def explained(keyword: str) -> list[str]:
    """What the lock file names in its lines `# keyword NAMES: reason`."""
    lines = re.findall(rf"^# {keyword} ([^:]+): \S", LOCK.read_text(), re.MULTILINE)
    return [name for line in lines for name in line.split(", ")]


def unexplained(said: str) -> list[str]:
    """Requirements in what `uv pip check` says, but for those of sglang that the lock file explains."""
    without = {canonicalize_name(name) for name in explained("without")}
    other = explained("not")
    left = []
    for package, requirement, what in DISAGREEMENT.findall(said):
        name = canonicalize_name(Requirement(requirement).name)
        if package != "sglang" or not (name in without if what == "it's not" else requirement in other):
            left.append(f"{package} requires {requirement}")
    return left


def test_only_what_is_explained_disagrees() -> None:
    check = [Path(sys.executable).with_name("uv"), "pip", "check", "--python", sys.executable]
    said = subprocess.run(check, capture_output=True, text=True, timeout=120).stderr
    other_python = OTHER_PYTHON.findall(said)
    found = int(re.search(r"Found (\d+) incompatibilities", said)[1])
    assert len(DISAGREEMENT.findall(said)) + len(other_python) == found, said
    assert unexplained(said) == []
    assert set(other_python) == (DECLARES_PYTHON_312 if sys.version_info < (3, 12) else set())


def test_nothing_is_explained_that_is_installed() -> None:
    installed = {canonicalize_name(distribution.name) for distribution in distributions()}
    without = [canonicalize_name(name) for name in explained("without")]
    assert len(without) > 30 and len(set(without)) == len(without)
    assert not set(without) & installed


def test_a_missing_or_other_package_is_found() -> None:
    said = """The package `sglang` requires `fastapi`, but it's not installed
The package `torch` requires `triton==3.7.1 ; sys_platform == 'linux'`, but `3.9.0` is installed
The package `sglang` requires `torch==2.15.0`, but `2.13.0` is installed
The package `datasets` requires `timm`, but it's not installed
The package `sglang` requires `timm==1.0.25`, but it's not installed
"""
    assert [line.partition(" ;")[0] for line in unexplained(said)] == [
        "sglang requires fastapi", "torch requires triton==3.7.1", "sglang requires torch==2.15.0",
        "datasets requires timm",
    ]  # fmt: skip
