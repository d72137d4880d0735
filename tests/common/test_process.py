"""Processes that end with those that started them, even by `kill -9`."""

import os
import subprocess
from pathlib import Path

import psutil

from tests.support.tiny_run import REPOSITORY, launcher
from tests.support.waiting import wait_until

RANK = """
import os, pathlib, sys, time
from megatron_dsrl.common.process import end_with_launcher
end_with_launcher()
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(60)
"""


def test_ranks_end_with_a_killed_torchrun(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    torchrun = subprocess.Popen([*launcher(2), str(tmp_path / "rank.py"), str(tmp_path)], env=environment)
    try:
        files = [tmp_path / "0", tmp_path / "1"]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60)
        torchrun.kill()
        torchrun.wait()
        ranks = [int(file.read_text()) for file in files]
        wait_until(lambda: not any(map(psutil.pid_exists, ranks)), 5)
    finally:
        torchrun.kill()
        torchrun.wait()
