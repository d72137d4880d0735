"""Start a command as several processes on this machine: `dsrl train CONFIG.yaml --processes 8`.

Each process gets the environment variables that torch.distributed reads, as from torchrun or `slurm/rank.sh`. Unlike
torchrun, which exits with 1 however a rank ended, the launcher exits with its processes' status: with 2 after a user's
error, with 75 when the run was asked to stop and has saved its state. A rank that has saved its part and exited does
not end the others, which may still be saving.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType

from megatron_dsrl.common.cpu_threads import usable_cores
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.held_port import HeldPort
from megatron_dsrl.common.process import LAUNCHER_VARIABLE
from megatron_dsrl.common.stop_signals import handling_signals
from megatron_dsrl.run.preemption import PREEMPTED_STATUS

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
POLL_SECONDS = 0.1
SAME_ERROR_SECONDS = 5.0
"""After a failure, time for the other ranks to hit the same error, which rank 0 prints."""
STOP_SECONDS = 30.0
"""Time from SIGTERM to SIGKILL, the same as torchrun's `--shutdown-timeout`."""
HANGING_SECONDS = 10.0
"""After a signal has ended one rank, time for the others to end before SIGKILL. One that waits for the others in a
collective does not notice the signal, such as Ctrl-C while the ranks are starting."""


def others_started(processes: int) -> bool:
    """Whether this process is already one of `processes`; UserError if torchrun or srun started a different number."""
    started = os.environ.get("WORLD_SIZE")
    if started is not None and int(started) != processes:
        raise UserError(f"--processes {processes}: torchrun or srun has started {started}; leave --processes out")
    return started is not None


def launch(command: Sequence[str], count: int) -> int:
    """Run `count` processes of a command until all have ended; signals that end a run are passed on to them.

    When a process fails, the others are stopped. Main thread only. Returns the exit status: that of the first process
    that failed, else 75 if any ended with it, else 0 or that of a signal.
    """
    port = HeldPort("127.0.0.1", None)  # kept for rank 0, which opens it seconds later
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port.number),
        # torchrun would set 1.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // count))),
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    with closing(port), _passing_on(ranks) as received:
        for rank in range(count):
            if received:
                break
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session for each, so that Ctrl-C in a terminal reaches it once, from here.
            environment = os.environ | shared | place
            ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True))
        return _wait(ranks, received)


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], received: set[int]) -> int:
    ended: dict[int, int] = {}
    deadlines: list[tuple[float, int]] = []  # (time, signal) for the remaining ranks
    failed: int | None = None
    killed = False
    while len(ended) < len(ranks):
        for rank, process in enumerate(ranks):
            if rank in ended or process.poll() is None:
                continue
            status = ended[rank] = process.returncode if process.returncode >= 0 else 128 - process.returncode
            now = time.monotonic()
            if status in (0, PREEMPTED_STATUS) or (killed and failed is None):
                continue
            if status - 128 in received:  # all got the signal, but one may hang
                deadlines = deadlines or [(now + HANGING_SECONDS, signal.SIGKILL)]
            elif failed is None:
                failed = rank
                stop = now + SAME_ERROR_SECONDS
                deadlines = [(stop, signal.SIGTERM), (stop + STOP_SECONDS, signal.SIGKILL)]
                _report(rank, status)
        if deadlines and time.monotonic() >= deadlines[0][0]:
            number = deadlines.pop(0)[1]
            killed = number == signal.SIGKILL
            _send(ranks, number)
        time.sleep(POLL_SECONDS)
    if failed is not None:
        return ended[failed]
    if PREEMPTED_STATUS in ended.values():
        return PREEMPTED_STATUS
    return next((status for status in ended.values() if status - 128 in received), 0)


def _report(rank: int, status: int) -> None:
    """Print how a rank ended, except after a user's error (2), which the rank has printed itself."""
    if status != 2:
        how = f"was ended by {signal.Signals(status - 128).name}" if status > 128 else f"exited with status {status}"
        print(f"dsrl: rank {rank} {how}; stopping the others", file=sys.stderr, flush=True)


@contextmanager
def _passing_on(ranks: Sequence["subprocess.Popen[bytes]"]) -> Iterator[set[int]]:
    """Pass signals on to the processes; yields those received so far. At the end, kill what still runs."""
    received: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.add(number)
        _send(ranks, number)

    with handling_signals(PASSED_ON, pass_on):
        try:
            yield received
        finally:
            _send(ranks, signal.SIGKILL)


def _send(ranks: Sequence["subprocess.Popen[bytes]"], number: int) -> None:
    for process in ranks:
        process.send_signal(number)  # does nothing for one that has ended
