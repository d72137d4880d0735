"""What can only be seen while a run is under way: the memory of the devices, and the settings of an engine."""

import json
import re
import socket
import subprocess
import threading
import urllib.request
from contextlib import suppress
from typing import Any, Self

import psutil

from megatron_dsrl.rollout.engines.address import API_KEY_VARIABLE

ENGINE = "megatron_dsrl.rollout.engines.server_process"
ENGINE_SETTINGS = (
    "attention_backend", "prefill_attention_backend", "decode_attention_backend", "sampling_backend",
    "disable_cuda_graph", "dtype", "kv_cache_dtype", "max_total_num_tokens",
    "max_running_requests", "mem_fraction_static", "chunked_prefill_size",
)  # fmt: skip
"""Fields of SGLang's /server_info."""


class Watcher:
    """Polls in a thread while the body of the `with` runs."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        raise NotImplementedError


class DeviceMemory(Watcher):
    """Peak memory of the fullest GPU, of all processes together, according to nvidia-smi."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_mebibytes = 0

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


class EngineSettings(Watcher):
    """The settings that the first engine of a running run reports. Polls until it answers."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.answer: dict[str, Any] = {}
        self._port = port
        self._url = f"http://127.0.0.1:{port}/server_info"

    @property
    def figures(self) -> dict[str, str]:
        """The settings that affect speed, as chosen by SGLang."""
        settings = {f"engine, {key}": str(self.answer[key]) for key in ENGINE_SETTINGS if key in self.answer}
        for passes, graphs in (self.answer.get("cuda_graph_config") or {}).items():
            settings[f"engine, CUDA graphs, {passes}"] = f"{graphs['backend']}, batches up to {graphs['max_bs']}"
        return settings

    def _poll(self) -> None:
        while not self.answer and not self._ended.wait(0.5):
            key = _engine_key(self._port)
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            try:
                with urllib.request.urlopen(urllib.request.Request(self._url, headers=headers), timeout=5) as reply:
                    self.answer = json.load(reply)
            except (OSError, ValueError):
                pass  # not there yet


def _engine_key(port: int) -> str | None:
    """The key of the engine on a port, from its environment: this process has started it, directly or not."""
    on_port = re.compile(rf'"port": ?{port}\b')
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = process.cmdline()
            if ENGINE in command and on_port.search(command[-1]):
                return process.environ().get(API_KEY_VARIABLE)
    return None


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that are free on loopback right now."""
    for _ in range(100):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            first = listener.getsockname()[1]
        if first + count <= 65536 and all(_is_free(port) for port in range(first, first + count)):
            return first
    raise OSError(f"found no {count} free ports in a row")


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
