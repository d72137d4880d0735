"""An environment with the real packages of the experiment trackers, beside the one that the tests run in."""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.support.tiny_run import REPOSITORY

LOCK = REPOSITORY / "tools" / "requirements-trackers.lock"
FOLDER = REPOSITORY / ".cache" / "trackers"


def tracker_python() -> Path:
    """The environment's Python. It is built if it is missing or the lock has changed, which needs pip's index and a
    minute or two.

    It sees the packages of this environment as well; its own come first.
    """
    python, stamp = FOLDER / "bin" / "python", FOLDER / "made_from"
    made_from = hashlib.sha256(LOCK.read_bytes()).hexdigest() + f" {sys.version} {sysconfig.get_path('purelib')}"
    if stamp.exists() and stamp.read_text() == made_from:
        return python
    shutil.rmtree(FOLDER, ignore_errors=True)
    venv.create(FOLDER, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "-r", LOCK], check=True, timeout=1200)
    packages = next((FOLDER / "lib").glob("python*/site-packages"))
    (packages / "tests_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    stamp.write_text(made_from)
    return python
