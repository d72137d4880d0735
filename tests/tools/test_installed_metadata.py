"""The installed packages' metadata agree with each other, but for what the lock file explains."""

import re
import subprocess
import sys
from importlib.metadata import distributions

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.tiny_run import REPOSITORY

LOCK = REPOSITORY / "tools" / "requirements-cpu-no-deps.lock"
MISSING = re.compile(r"^(\S+) \S+ requires (\S+), which is not installed\.$")
OTHER_VERSION = re.compile(r"^(\S+) \S+ has requirement (\S+?)(?:;.*)?, but you have \S+ \S+\.$")


def explained(keyword: str) -> list[str]:
    """What the lock file names in its lines `# keyword NAMES: reason`."""
    lines = re.findall(rf"^# {keyword} ([^:]+): \S", LOCK.read_text(), re.MULTILINE)
    return [name for line in lines for name in line.split(", ")]


def unexplained(said: str) -> list[str]:
    """Lines of `pip check` about anything but what the lock file explains of sglang."""
    without = {canonicalize_name(name) for name in explained("without")}
    other = {str(Requirement(requirement)) for requirement in explained("not")}
    left = []
    for line in said.splitlines():
        missing, version = MISSING.match(line), OTHER_VERSION.match(line)
        if missing and missing[1] == "sglang" and canonicalize_name(missing[2]) in without:
            continue
        if version and version[1] == "sglang" and str(Requirement(version[2])) in other:
            continue
        left.append(line)
    return left


def test_pip_check_says_nothing_but_what_is_explained():
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=240)
    assert checked.stdout, checked.stderr
    assert unexplained(checked.stdout) == []


def test_nothing_is_explained_that_is_installed():
    installed = {canonicalize_name(distribution.name) for distribution in distributions()}
    without = [canonicalize_name(name) for name in explained("without")]
    assert len(without) > 30 and len(set(without)) == len(without)
    assert not set(without) & installed


def test_a_missing_or_other_package_is_found():
    said = [
        "sglang 0.5.23 requires fastapi, which is not installed.",
        "torch 2.13.0 has requirement triton==3.7.1; platform_system == \"Linux\", but you have triton 3.9.0.",
        "datasets 5.2.0 requires timm, which is not installed.",
    ]
    assert unexplained("\n".join(said)) == said
    assert unexplained("sglang 0.5.23 requires timm, which is not installed.") == []
