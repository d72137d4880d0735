"""Requests to stop, and a terminal that is closed."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from tests.support.tiny_run import REPOSITORY
from tests.support.waiting import wait_until

TRAINS = """
import pathlib, sys, time
from megatron_dsrl.run.preemption import Preempted, StopRequested, StopSignal
folder = pathlib.Path(sys.argv[1])
with StopSignal() as stop:
    try:
        with stop.interruptible():
            (folder / "started").touch()
            time.sleep(float(sys.argv[2]))
    except StopRequested:
        print("saving", flush=True)  # to a terminal that is gone
        print("saving", file=sys.stderr, flush=True)
        (folder / "saved").touch()
        raise Preempted
"""


TERMINAL = """
import fcntl, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
"""
IGNORES = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"


def start_in_terminal(folder: Path, seconds: float, first: str = "") -> tuple["subprocess.Popen[bytes]", int]:
    """The process, whose terminal is closed by closing the descriptor."""
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL + first + TRAINS, str(folder), str(seconds)],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    os.close(terminal)
    wait_until((folder / "started").exists, 60)
    return process, master


def test_a_run_whose_terminal_is_closed_saves_its_state(tmp_path) -> None:
    process, master = start_in_terminal(tmp_path, 60.0)
    os.close(master)
    assert process.wait(60) == 75
    assert (tmp_path / "saved").exists()


def test_under_nohup_it_continues(tmp_path) -> None:
    process, master = start_in_terminal(tmp_path, 1.0, IGNORES)
    os.close(master)
    assert process.wait(60) == 0
    assert not (tmp_path / "saved").exists()


SIGNALLED_WHILE_IT_ENDS = """
import atexit, os, signal
from megatron_dsrl.common.stop_signals import handling_signals
from megatron_dsrl.run.preemption import Preempted, StopSignal

def end(number, frame):
    raise SystemExit(128 + number)

def ask_again():
    os.kill(os.getpid(), signal.SIGTERM)

atexit.register(ask_again)
with handling_signals([signal.SIGTERM], end):  # as the command does
    try:
        with StopSignal():
            ask_again()
            raise Preempted
    finally:
        ask_again()
"""


def test_a_rank_that_has_saved_its_state_ends_with_its_own_status() -> None:
    """Although srun asks it to end as well, since another rank has already."""
    process = subprocess.run([sys.executable, "-c", SIGNALLED_WHILE_IT_ENDS], cwd=REPOSITORY, timeout=60)
    assert process.returncode == 75
