"""Processes that end with those that started them, `kill -9` included."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.tiny_run import REPOSITORY, launcher

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
        assert within_seconds(60, lambda: all(file.exists() and file.read_text() for file in files))
        torchrun.kill()
        torchrun.wait()
        ranks = [int(file.read_text()) for file in files]
        assert within_seconds(5, lambda: not any(map(psutil.pid_exists, ranks)))
    finally:
        torchrun.kill()
        torchrun.wait()


def within_seconds(limit: float, what) -> bool:
    deadline = time.monotonic() + limit
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return what()


@pytest.mark.parametrize(
    ("variables", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_a_command_limits_spinning_before_torch_is_loaded(variables: dict[str, str], spins: str) -> None:
    code = (
        "import os, sys; from megatron_dsrl.cli import main; before = 'torch' in sys.modules; "
        "main(['completion', 'bash']); print(before, os.environ.get('GOMP_SPINCOUNT'))"
    )
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    completed = subprocess.run([sys.executable, "-c", code], env=unset | variables, capture_output=True, text=True)
    assert completed.stdout.splitlines()[-1] == f"False {spins}", completed.stderr
