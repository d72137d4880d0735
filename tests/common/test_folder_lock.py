"""One command at a time in a folder, with real processes."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_dsrl.common import folder_lock
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.folder_lock import LOCK_FILE, locked
from tests.support.distributed import run_distributed
from tests.support.tiny_run import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from megatron_dsrl.common.folder_lock import locked
with locked(Path(sys.argv[1]), print):
    print("locked", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / "tiny"


@pytest.fixture
def holder(folder) -> Iterator[subprocess.Popen[str]]:
    """A process that has locked the folder, which did not exist."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def refusal(folder: Path) -> str:
    """On every rank: why it may not have the folder."""
    folder_lock.WAIT_SECONDS = 0.0
    dist.init_process_group("gloo")
    with pytest.raises(UserError) as refused, locked(folder, lambda text: None):
        pass
    dist.destroy_process_group()
    return str(refused.value)


def test_a_second_command_is_refused_on_every_rank_until_the_first_is_killed(folder, holder) -> None:
    first, second = run_distributed(refusal, 2, folder)
    assert f"{folder} is in use by process {holder.pid} on {socket.gethostname()}, and two commands would" in first
    assert second == first
    assert [file.name for file in folder.iterdir()] == [LOCK_FILE]

    holder.kill()
    reports: list[str] = []
    with locked(folder, reports.append):
        assert (folder / LOCK_FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    with locked(folder, reports.append):
        """The one before has ended properly."""


def test_a_process_that_is_about_to_end_is_waited_for(folder, holder) -> None:
    reports: list[str] = []
    threading.Timer(0.5, holder.kill).start()
    with locked(folder, reports.append):
        assert reports == [
            f"{folder} is in use by process {holder.pid} on {socket.gethostname()}; waiting up to 30 s for it to exit"
        ]


def test_a_host_that_may_be_gone_is_waited_for_longer(folder, holder, monkeypatch) -> None:
    (folder / LOCK_FILE).write_text("process 7 on elsewhere")
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.0)
    reports: list[str] = []
    threading.Timer(0.5, holder.kill).start()
    with locked(folder, reports.append):
        assert reports == [f"{folder} is in use by process 7 on elsewhere; waiting up to 120 s for it to exit"]


def test_a_file_system_without_locks_is_reported_and_a_folder_that_cannot_be_made_is_an_error(
    folder, monkeypatch
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    reports: list[str] = []
    with locked(folder, reports.append):
        assert reports == [
            f"{folder}: the file system has no locks ([Errno 37] No locks available); do not run a second command in "
            "this folder"
        ]
    (folder / "file").touch()
    with (
        pytest.raises(UserError, match="cannot write to .*/file/run: .*Not a directory"),
        locked(folder / "file" / "run", reports.append),
    ):
        pass
