"""Forked processes, and ranks made of them: what they begin with, and how their failures are reported."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.distributed import run_distributed
from tests.support.forked import fork, forked_processes
from tests.support.waiting import wait_until


def say_where_it_is() -> None:
    print(os.environ["ONLY_HERE"], "HOME" in os.environ, Path.cwd(), tempfile.gettempdir(), os.getsid(0) == os.getpid())
    sys.exit(7)


def test_environment_folder_output_and_session_are_those_asked_for(tmp_path: Path) -> None:
    with open(tmp_path / "output", "w") as output:
        environment = {"ONLY_HERE": "1", "TMPDIR": str(tmp_path)}
        process = fork(say_where_it_is, environment=environment, folder=tmp_path, output=output.fileno())
    assert process.wait(60) == 7
    assert (tmp_path / "output").read_text() == f"1 False {tmp_path} {tmp_path} True\n"


def sleep_with_a_child() -> None:
    subprocess.run(["sleep", "600"])


def test_a_killed_process_has_the_status_of_its_signal_and_is_listed_while_it_runs() -> None:
    process = fork(sleep_with_a_child)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert process.poll() is None
    wait_until(lambda: len(forked_processes()) == 2, 60)
    forked = forked_processes()
    assert process.pid in [one.pid for one in forked]
    for one in forked:
        one.kill()
    assert process.wait(60) == process.poll() == -signal.SIGKILL
    assert forked_processes() == []


def rank_and_rendezvous() -> list[str]:
    return [os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "FROM_THE_TEST")]


def test_results_come_in_the_order_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_THE_TEST", "yes")
    assert run_distributed(rank_and_rendezvous, 2) == [[rank, "2", "127.0.0.1", "yes"] for rank in "01"]


def fail_on_rank_1(how: str) -> None:
    if os.environ["RANK"] == "0" or how == "sleep":
        time.sleep(600)
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("no such layout")


@pytest.mark.parametrize(
    ("how", "seconds", "message"),
    [
        ("raise", 120, "(?s)process 1 failed:.*fail_on_rank_1.*no such layout"),
        ("die", 120, "process 1 died with status -9"),
        ("sleep", 1, r"processes \[0, 1\] did not finish in time"),
    ],
)
def test_a_failure_of_one_rank_is_reported_and_ends_all(how: str, seconds: float, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_distributed(fail_on_rank_1, 2, how, timeout_seconds=seconds)
    assert forked_processes() == []


def test_processes_share_nothing() -> None:
    """Nothing that one leaves in memory is there for the next."""
    first, second = (run_distributed(leave_a_module, 1)[0] for _ in range(2))
    assert first == second


def leave_a_module() -> list[str]:
    names = sorted(name for name in sys.modules if name.startswith("tests."))
    sys.modules["tests.left_by_a_rank"] = sys.modules[__name__]
    return names
