"""One SGLang server: its port, its start, its failures and its end."""

import atexit
import logging
import signal
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dsrl.common.disk import is_full
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.held_port import PORT_LOST_STATUS, HeldPort
from megatron_dsrl.platform.engine import ServerArguments
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.errors import EngineError, EngineStartError
from megatron_dsrl.rollout.engines.server_process import ServerProcess, processes_of
from megatron_dsrl.rollout.engines.server_settings import write_settings

logger = logging.getLogger(__name__)

LOG_LINES_IN_ERROR = 15
DEVICE_FAILURES = ("CUDA error", "CUDA out of memory", "NCCL error")
"""In the log of a server that its GPU has ended, perhaps because a process of the job before still held memory."""
TROUBLESHOOTING = "see examples/troubleshooting: engines"
POLL_SECONDS = 0.2
CALL_SECONDS = 5.0


@dataclass(eq=False)
class EngineServer:
    """Starts, watches and stops one SGLang server.

    The server runs in its own session and process group: Ctrl-C reaches only the trainer, which then stops the server.
    It also dies with the trainer's process, however that ends.
    """

    arguments: ServerArguments
    """SGLang's `ServerArgs` fields without host and port."""
    environment: dict[str, str]
    """Variables added to this process's environment."""
    log_file: Path
    """Receives the server's output; its folder is created."""
    startup_timeout_seconds: float
    """Limit of `wait_until_ready`."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int | None = None
    """None takes a free one."""
    key: str | None = field(default=None, repr=False)
    """Key that every caller must send; None: the server answers every caller."""
    warm_up: Callable[[float], None] | None = None
    """Called when the server answers, with the remaining seconds of the limit, before it counts as ready. Raises
    EngineError if the server fails it."""
    starting: ServerProcess | None = None
    """Becomes the server at its first start; None: a new one."""

    def __post_init__(self) -> None:
        self._held: HeldPort | None = None
        self._running: ServerProcess | None = None
        self._started_at = 0.0

    @property
    def url(self) -> str:
        """`http://host:port` of the started server."""
        assert self._held is not None, "the server has no port before start()"
        return f"http://{self.host}:{self._held.number}"

    @property
    def address(self) -> EngineAddress:
        return EngineAddress(self.url, self.key)

    @property
    def process_id(self) -> int | None:
        """Process and process-group id of the server; None before start() and after stop()."""
        return None if self._running is None else self._running.process.pid

    def start(self) -> None:
        """Start the subprocess and return at once. Main thread only. Raises UserError if the port is in use."""
        assert self._running is None, "the server was started before"
        self._held = self._held or HeldPort(self.host, self.port)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        arguments: dict[str, Any] = {**self.arguments, "host": self.host, "port": self._held.number}
        self._running = self.starting or ServerProcess(self.environment)
        self.starting = None
        self._running.serve(arguments, self.environment, self.key, self.log_file)
        self._started_at = time.monotonic()
        atexit.register(self.stop)

    def restart(self) -> None:
        """Kill the server, if it is running, and start it again, on the same port unless it lost that; see `start`."""
        self._end()
        self.start()

    def wait_until_ready(self) -> None:
        """Block until this server, and not another one on its port, answers.

        Raises:
            UserError: it exited by itself, and the message has the last lines of its log; or the log's disk is full.
            EngineStartError: it was killed by a signal or by a failure of its GPU, another process has its port, it did
                not answer within the limit, or it failed its warm-up. It was stopped.
        """
        deadline = self._started_at + self.startup_timeout_seconds
        while not self._is_ready():
            self.check_alive()
            if time.monotonic() > deadline:
                self._end()
                raise EngineStartError(
                    f"the SGLang server at {self.url} was not ready within engine.startup_timeout_seconds = "
                    f"{self.startup_timeout_seconds:g}; raise the limit, or fix what its log shows "
                    f"({TROUBLESHOOTING}).\n{self.log_tail()}"
                )
            time.sleep(POLL_SECONDS)
        if self.warm_up is not None:
            try:
                self.warm_up(max(CALL_SECONDS, deadline - time.monotonic()))
            except EngineError as error:
                self._end()
                raise EngineStartError(f"the SGLang server at {self.url} failed its first requests: {error}") from error
        assert self._running is not None
        self._running.note_shared_memory()
        self._freeze_garbage_collection()
        self._record_settings()

    def has_ended(self) -> bool:
        """Whether the server process was started and has exited without being stopped."""
        return self._running is not None and self._running.process.poll() is not None

    def check_alive(self) -> None:
        """Raise, as `wait_until_ready` does, if the server process has exited."""
        assert self._running is not None, "the server was not started"
        status = self._running.process.poll()
        if status is None:
            return
        if status == PORT_LOST_STATUS:
            self._lose_port()
        self._end()
        number = -status if status < 0 else status - 128
        if is_full(self.log_file.parent):
            raise UserError(
                f"{self.log_file}: the disk is full, and an SGLang server exits when it cannot write its log; free "
                "space, then run the command again"
            )
        if number in set(signal.Signals):
            raise EngineStartError(
                f"the SGLang server at {self.url} was killed by {_signal(number)}.\n{self.log_tail()}"
            )
        log = self.log_tail()
        message = (
            f"the SGLang server at {self.url} exited with status {status}; fix what its log shows "
            f"({TROUBLESHOOTING}).\n{log}"
        )
        raise EngineStartError(message) if any(failure in log for failure in DEVICE_FAILURES) else UserError(message)

    def stop(self) -> None:
        """Kill the server and all its processes, and give up its port. May be called again."""
        self._end()
        if self._held is not None:
            self._held.close()
            self._held = None

    def log_tail(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()[-LOG_LINES_IN_ERROR:]
        return "\n".join([f"Last lines of {self.log_file}:", *lines])

    def _end(self) -> None:
        """End the server; keep the port."""
        ended, self._running = self._running, None
        if ended is not None:
            atexit.unregister(self.stop)
            ended.end()

    def _is_ready(self) -> bool:
        """Whether the server answers. Raises EngineStartError if another process listens on its port."""
        assert self._held is not None and self._running is not None
        if not self._held.is_open():
            return False
        if not self._held.is_open_by(processes_of(self._running.process.pid)):
            self._lose_port()
        try:
            # SGLang opens its port only after the schedulers have loaded the model.
            self._call("GET", "/model_info")
        except OSError:
            return False
        return True

    def _lose_port(self) -> None:
        """Stop the server, whose port another process has taken, and raise EngineStartError."""
        url = self.url
        self.stop()
        raise EngineStartError(f"another program listens at {url}, the address of the SGLang server")

    def _freeze_garbage_collection(self) -> None:
        """Exclude all objects that exist once the model is loaded from garbage collections, which pause sampling."""
        try:
            self._call("POST", "/freeze_gc")
        except OSError as error:
            logger.warning("engine %s: garbage collection may pause sampling, /freeze_gc failed: %s", self.url, error)

    def _record_settings(self) -> None:
        try:
            write_settings(self._call("GET", "/server_info"), self.log_file)
        except (OSError, ValueError) as error:
            logger.warning("engine %s: its settings are not recorded: %s", self.url, error)

    def _call(self, method: str, path: str) -> bytes:
        """The body of the server's answer. Raises OSError without one in time, or with a status other than 200."""
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(self.url + path, method=method, headers=self.address.headers)
        with without_proxy.open(request, timeout=CALL_SECONDS) as answer:
            return answer.read()


def _signal(number: int) -> str:
    """The name of a signal that ended a process, and what usually sends it."""
    if number == signal.SIGKILL:
        return "SIGKILL, as from the kernel when memory runs out (`dmesg -T | grep -i oom` shows it)"
    return signal.Signals(number).name
