"""Stream an actor's weights into a second process on the same device, as into an engine: CUDA IPC, or shared memory."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.platform import current_platform
from megatron_dsrl.platform.weight_digest import weight_digest
from megatron_dsrl.rollout.engines.flattened_bucket import BucketMemory, flatten, serialise
from tools.gpu_probe.clock import seconds_of
from tools.gpu_probe.reports import Figures
from tools.gpu_record.machine import ROOT

ANSWER_SECONDS = 180.0


class Receiver:
    """The second process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.started = self._answer()
        """Its first answer."""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request, and wait for the answer.

        Raises:
            RuntimeError: it has ended, or does not answer.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            raise RuntimeError(f"the receiver has not answered for {ANSWER_SECONDS:g} s") from None
        if not line:
            raise RuntimeError(f"the receiver has exited with status {self._process.wait(10)}; its error is above")
        return json.loads(line)


@contextmanager
def receiver() -> Iterator[Receiver]:
    """Start the second process, and end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.gpu_probe.receiver"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Receiver(process)
    finally:
        process.kill()
        process.wait(30)


def measure_weight_stream(actor: Actor, bucket_bytes: int, rounds: int = 3) -> Figures:
    """Rate of the stream, and whether every tensor arrived.

    Raises:
        RuntimeError: the receiver failed, or holds weights other than those sent.
    """
    memory = BucketMemory()
    with receiver() as other:

        def stream() -> None:
            for bucket in actor.model.hf_weights(bucket_bytes):
                flattened = flatten(bucket, memory)
                other.ask({"bucket": serialise(flattened)})
                del flattened  # not before it was copied

        seconds = [seconds_of(stream) for _ in range(rounds)]
        arrived = other.ask({"digests": True})["digests"]
    sent = {name: tensor for bucket in actor.model.hf_weights(bucket_bytes) for name, tensor in bucket}
    wrong = [name for name, tensor in sent.items() if arrived.get(name) != weight_digest(tensor)]
    if wrong or len(arrived) != len(sent):
        raise RuntimeError(f"{len(wrong)} of {len(sent)} tensors arrived wrong, such as {wrong[:3]}")
    size = sum(tensor.nbytes for tensor in sent.values())
    way = "CUDA IPC" if current_platform().name == "cuda" else "shared memory"
    return {
        f"weight stream ({way}), GB/s": f"{size / min(seconds) / 1e9:.3g}",
        "weight stream, first round, GB/s": f"{size / seconds[0] / 1e9:.3g}",
        "weight stream, digests": f"all {len(sent)} tensors equal, {size / 1e9:.3g} GB",
        "weight stream, opened by": other.started["code"],
    }
