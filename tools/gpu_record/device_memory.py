"""Peak memory of the GPUs while a run is under way."""

import subprocess
import threading
from typing import Self


class DeviceMemory:
    """Peak memory of the fullest GPU, of all processes together, according to nvidia-smi. Polls in a thread while the
    body of the `with` runs."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self.peak_mebibytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def figures(self) -> dict[str, str]:
        """Empty if nvidia-smi does not answer."""
        name = "device, peak memory of all processes, GiB"
        return {name: f"{self.peak_mebibytes / 1024:.2f}"} if self.peak_mebibytes else {}

    def _poll(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self._ended.wait(0.5):
            try:
                answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
                self.peak_mebibytes = max(self.peak_mebibytes, *map(int, answer.split()))
            except (OSError, ValueError, subprocess.SubprocessError):
                return
