"""One SGLang server as a supervised subprocess."""

import atexit
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

import megatron_dsrl
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.platform.engine import ServerArguments
from megatron_dsrl.rollout.engines.credentials import engine_headers

logger = logging.getLogger(__name__)

LOG_LINES_IN_ERROR = 15
TROUBLESHOOTING = "see examples/troubleshooting: engines"
POLL_SECONDS = 0.2
CALL_SECONDS = 5.0
STOP_GRACE_SECONDS = 2.0
SERVER_PROCESS = "megatron_dsrl.rollout.engines.server_process"


class EngineServer:
    """Starts, watches and stops one SGLang server.

    The server runs in its own session and process group: Ctrl-C reaches only the trainer, which then stops the server.
    It also dies with the trainer's process, however that ends.
    """

    def __init__(
        self,
        arguments: ServerArguments,
        environment: dict[str, str],
        log_file: Path,
        startup_timeout_seconds: float,
        host: str = "127.0.0.1",
        port: int | None = None,
    ) -> None:
        """
        Args:
            arguments: SGLang `ServerArgs` fields without host and port.
            environment: Variables added to this process's environment.
            log_file: Receives the server's output; its folder is created.
            startup_timeout_seconds: Limit of `wait_until_ready`.
            host: Address to listen on.
            port: Port to listen on; None takes a free one.
        """
        self._arguments = arguments
        self._environment = environment
        self._log_file = log_file
        self._startup_timeout_seconds = startup_timeout_seconds
        self._host = host
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._started_at = 0.0

    @property
    def url(self) -> str:
        """`http://host:port` of the started server."""
        assert self._port is not None, "the server has no port before start()"
        return f"http://{self._host}:{self._port}"

    @property
    def process_id(self) -> int | None:
        """Process and process-group id of the server; None before start() and after stop()."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the subprocess and return at once.

        Main thread only: the subprocess ends when the thread that started it does.

        Raises:
            UserError: The port is in use.
        """
        assert threading.current_thread() is threading.main_thread()
        assert self._process is None, "the server was started before"
        self._port = _claim_port(self._host, self._port)
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = {**self._arguments, "host": self._host, "port": self._port}
        package_root = str(Path(megatron_dsrl.__file__).resolve().parents[1])
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # SGLang leaves its sockets in the temporary folder; its name is short because socket paths are limited.
        self._scratch = tempfile.TemporaryDirectory(prefix="dsrl-", ignore_cleanup_errors=True)
        environment = {**_inherited_environment(), "TMPDIR": self._scratch.name, **self._environment}
        with open(self._log_file, "ab") as log:  # keep the log of an earlier start of the run
            self._process = subprocess.Popen(
                [sys.executable, "-m", SERVER_PROCESS, json.dumps([os.getpid(), arguments])],
                env=environment | {"PYTHONPATH": os.pathsep.join(search_path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started_at = time.monotonic()
        atexit.register(self.stop)

    def wait_until_ready(self) -> None:
        """Block until the server answers.

        Raises:
            UserError: It exited, or did not answer within the limit and was stopped; the message has the last lines of
                its log.
        """
        deadline = self._started_at + self._startup_timeout_seconds
        while not self._answers():
            self.check_alive()
            if time.monotonic() > deadline:
                self.stop()
                raise UserError(
                    f"the SGLang server at {self.url} was not ready within engine.startup_timeout_seconds = "
                    f"{self._startup_timeout_seconds:g}; raise the limit, or fix what its log shows "
                    f"({TROUBLESHOOTING}).\n{self.log_tail()}"
                )
            time.sleep(POLL_SECONDS)
        self._freeze_garbage_collection()

    def has_ended(self) -> bool:
        """Whether the server process was started and has exited without being stopped."""
        return self._process is not None and self._process.poll() is not None

    def check_alive(self) -> None:
        """Raise if the server process has exited.

        Raises:
            UserError: It has; the message has the last lines of its log.
        """
        assert self._process is not None, "the server was not started"
        status = self._process.poll()
        if status is not None:
            self.stop()
            raise UserError(
                f"the SGLang server at {self.url} exited with status {status}; fix what its log shows "
                f"({TROUBLESHOOTING}).\n{self.log_tail()}"
            )

    def stop(self) -> None:
        """Kill the server and all its processes. May be called again."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        # Not SIGTERM: an engine has nothing to save, and SGLang takes up to five seconds to react by killing its
        # processes. They die with the server; multiprocessing's resource tracker then cleans up and exits by itself.
        spawned = _descendants(process.pid)
        process.kill()
        process.wait()
        deadline = time.monotonic() + STOP_GRACE_SECONDS
        while any(map(_is_alive, spawned)) and time.monotonic() < deadline:
            time.sleep(0.02)
        _kill_group(process.pid)
        assert self._scratch is not None
        self._scratch.cleanup()

    def log_tail(self) -> str:
        """The end of the server's output, for an error message."""
        lines = self._log_file.read_text(errors="replace").splitlines()[-LOG_LINES_IN_ERROR:]
        return "\n".join([f"Last lines of {self._log_file}:", *lines])

    def _answers(self) -> bool:
        try:
            # SGLang opens its port only after the schedulers have loaded the model.
            self._call("GET", "/model_info")
        except OSError:
            return False
        return True

    def _freeze_garbage_collection(self) -> None:
        """Exclude all objects that exist once the model is loaded from garbage collections, which pause sampling."""
        try:
            self._call("POST", "/freeze_gc")
        except OSError as error:
            logger.warning("engine %s: garbage collection may pause sampling, /freeze_gc failed: %s", self.url, error)

    def _call(self, method: str, path: str) -> None:
        """Call the server and ignore its answer.

        Raises:
            OSError: No answer in time, or a status other than 200.
        """
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(self.url + path, method=method, headers=engine_headers())
        without_proxy.open(request, timeout=CALL_SECONDS).close()


def _claim_port(host: str, port: int | None) -> int:
    """`port`, or any free port if it is None.

    Raises:
        UserError: The port is in use.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: ignores TIME_WAIT
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise UserError(
                f"engine.port: port {port} on {host} cannot be used ({error.strerror}); set another port, or null for "
                "any free one"
            ) from error
        return probe.getsockname()[1]


def _inherited_environment() -> dict[str, str]:
    """This process's environment without variables that are meant for the trainer alone: torchrun's rendezvous, which
    SGLang's own process group would use; the paths of collective records, which the engine's ranks would overwrite; and
    PyTorch's allocator settings, since SGLang cannot release memory of expandable segments."""
    rendezvous = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    records = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    allocator = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in (*rendezvous, *records, *allocator) and not name.startswith("TORCHELASTIC_")
    }


def _descendants(process_id: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process_id).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
