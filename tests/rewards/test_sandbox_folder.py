"""What the sandbox leaves of its temporary folders: nothing but those in use."""

import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from megatron_dsrl.rewards.sandbox import Outcome, run_program
from megatron_dsrl.rewards.sandbox_folder import NEW_SECONDS, PREFIX
from tests.support.sandbox_limits import LIMITS
from tests.support.tiny_run import REPOSITORY


@pytest.mark.parametrize("isolated", [True, False])
def test_nothing_is_left_when_the_caller_is_killed(
    isolated: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if isolated:
        request.getfixturevalue("isolation")
    script = (
        "from megatron_dsrl.rewards.sandbox import Limits, run_program\n"
        f"run_program('import time; time.sleep(60)', Limits(wall_seconds=60.0), isolated={isolated})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}
    caller = psutil.Popen([sys.executable, "-c", script], env=environment)
    family = _wait_for_family(caller, 3)
    caller.kill()
    caller.wait()
    assert psutil.wait_procs(family, timeout=20)[1] == []
    left = list(tmp_path.iterdir())
    assert len(left) == (0 if isolated else 1)
    for folder in left:
        _make_old(folder)
    run_in(tmp_path, "pass")
    assert list(tmp_path.iterdir()) == []


def _wait_for_family(process: psutil.Process, size: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while len(family := process.children(recursive=True)) < size:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return family


def _make_old(folder: Path) -> None:
    then = time.time() - 2 * NEW_SECONDS
    os.utime(folder, (then, then))


def run_in(folder: Path, program: str) -> Outcome:
    """Run a program unsafely with its temporary folder in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        return run_program(program, LIMITS, isolated=False)


def test_folders_in_use_are_kept(tmp_path: Path) -> None:
    import fcntl

    mine = tmp_path / f"{PREFIX}mine"
    mine.mkdir()
    _make_old(mine)
    descriptor = os.open(mine, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert run_in(tmp_path, "pass").passed
    assert list(tmp_path.iterdir()) == [mine]
    os.close(descriptor)


@pytest.mark.parametrize(
    "program",
    [
        "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')",
        "import os\nos.makedirs('closed/inner')\nos.chmod('closed/inner', 0)\nos.chmod('closed', 0)",
    ],
)
def test_folders_of_any_depth_and_permissions_are_removed(program: str, tmp_path: Path) -> None:
    assert run_in(tmp_path, program).passed
    assert list(tmp_path.iterdir()) == []
