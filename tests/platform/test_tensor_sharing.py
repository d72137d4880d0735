"""Tensors that other processes open: what torch starts for it must survive the signals that ask a run to stop."""

import subprocess
import sys


def test_slurm_may_signal_every_process_of_a_job_while_weights_are_shared() -> None:
    """`scancel --signal` reaches torch's shared-memory manager too; without it the next push would end the run."""
    program = """
import os, signal, time
import psutil, torch
from megatron_dsrl.platform.engine import tensor_sharing

caught = []
signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
with tensor_sharing():
    first = torch.zeros(4).share_memory_()
managers = [process for process in psutil.Process().children() if process.name() == "torch_shm_manager"]
assert len(managers) == 1, managers
for pid in (managers[0].pid, os.getpid()):
    os.kill(pid, signal.SIGUSR1)
time.sleep(0.2)
with tensor_sharing():
    second = torch.zeros(4).share_memory_()
assert caught == [signal.SIGUSR1], "this process still hears it"
print("shared")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "shared\n", result.stderr
