"""`--processes N`: what the processes are given, and how the launcher ends with them. With small programs as ranks."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_dsrl.common.cpu_threads import usable_cores
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.run import launch as launching
from megatron_dsrl.run.launch import launch, others_started
from tests.support.tiny_run import REPOSITORY, write_tiny_run
from tests.support.waiting import wait_until

STATUSES = "import os, sys; sys.exit(dict(enumerate({statuses})).get(int(os.environ['RANK'])))"
WAITS = """
import os, pathlib, signal, sys, time
from megatron_dsrl.common.process import end_with_launcher
end_with_launcher()
rank = int(os.environ["RANK"])
def stop(number, frame):
    pathlib.Path(sys.argv[1], f"stopped_{rank}").write_text(str(number))
    time.sleep(rank)  # the ranks do not end at the same moment
    sys.exit(int(sys.argv[2]))
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, stop)
pathlib.Path(sys.argv[1], f"started_{rank}").write_text(str(os.getpid()))
while True:
    time.sleep(0.1)
"""


def test_ranks_meet_and_get_their_places(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = max(1, usable_cores() // 2)
    program = """
import os, pathlib, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
dist.destroy_process_group()  # else gloo's threads may abort the process at its end
line = f"{total.item()} {os.environ['LOCAL_RANK']} {os.environ['LOCAL_WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']}"
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(line)
"""
    assert launch([sys.executable, "-c", program, str(tmp_path)], 2) == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == [f"3 0 2 {threads}", f"3 1 2 {threads}"]


@pytest.mark.parametrize(
    ("statuses", "status", "said"),
    [
        ([0, 0], 0, ""),
        ([2, 2], 2, ""),
        ([75, 75], 75, ""),
        ([75, 0], 75, ""),
        ([0, 3], 3, "dsrl: rank 1 exited with status 3; stopping the others\n"),
    ],
)
def test_it_ends_as_the_processes_do(statuses, status, said, capsys) -> None:
    assert launch([sys.executable, "-c", STATUSES.format(statuses=statuses)], len(statuses)) == status
    assert capsys.readouterr().err == said


def test_the_others_are_stopped_when_one_fails(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(launching, "SAME_ERROR_SECONDS", 0.5)
    monkeypatch.setattr(launching, "STOP_SECONDS", 0.5)
    program = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # hangs in a collective
time.sleep(60)
"""
    started = time.monotonic()
    assert launch([sys.executable, "-c", program], 2) == 137
    assert time.monotonic() - started < 30
    assert capsys.readouterr().err == "dsrl: rank 1 was ended by SIGKILL; stopping the others\n"


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_signals_reach_every_rank_once_and_none_is_cut_short(tmp_path, sent, status) -> None:
    process = start(tmp_path, status)
    process.send_signal(sent)
    assert process.wait(30) == status
    assert [(tmp_path / f"stopped_{rank}").read_text() for rank in range(2)] == [str(int(sent))] * 2


def test_a_rank_that_does_not_notice_the_signal_is_killed_without_being_called_a_failure(
    tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(launching, "HANGING_SECONDS", 0.5)
    program = f"""
import os, pathlib, signal, time
if os.environ["RANK"] == "1":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # waits for rank 0 in a collective
pathlib.Path({str(tmp_path)!r}, os.environ["RANK"]).touch()
time.sleep(60)
"""

    def stop() -> None:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 30)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert launch([sys.executable, "-c", program], 2) == 143
    assert capfd.readouterr().err == ""


def test_ranks_end_with_a_killed_launcher(tmp_path) -> None:
    process = start(tmp_path, 0)
    ranks = [int((tmp_path / f"started_{rank}").read_text()) for rank in range(2)]
    process.kill()
    process.wait(30)
    wait_until(lambda: not any(map(psutil.pid_exists, ranks)), 60)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_of_two_processes_saves_its_state_and_ends_with_75(tmp_path) -> None:
    config = write_tiny_run(tmp_path)
    run = tmp_path / "runs" / "tiny"
    command = [sys.executable, "-m", "megatron_dsrl.cli", "train", str(config), "--processes", "2", "steps=500"]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: (run / "rollouts" / "step_000002.jsonl").exists() or process.poll() is not None, seconds=280)
        process.send_signal(signal.SIGTERM)
        assert process.wait(200) == 75, (tmp_path / "output").read_text()
    finally:
        process.kill()
    assert list((run / "checkpoints").glob("step_*"))


def start(folder: Path, status: int) -> "subprocess.Popen[bytes]":
    """A launcher in a separate process, with two ranks that wait and end with this status when they are signalled."""
    (folder / "rank.py").write_text(WAITS)
    program = "import sys; from megatron_dsrl.run.launch import launch; sys.exit(launch(sys.argv[1:], 2))"
    rank = [sys.executable, str(folder / "rank.py"), str(folder), str(status)]
    process = subprocess.Popen([sys.executable, "-c", program, *rank], env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    files = [folder / "started_0", folder / "started_1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files), 60)
    return process


@pytest.mark.parametrize(("world_size", "started"), [(None, False), ("2", True)])
def test_a_rank_does_not_start_others(world_size, started, monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert others_started(2) is started


def test_another_number_than_torchruns_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--processes 2: torchrun or srun has started 4"):
        others_started(2)
