"""A server process that imports SGLang while its arguments are still being worked out.

The imports are most of an engine's start on a CPU, and nothing about the run matters to them except a few environment
variables. So a training run starts the process before it imports Megatron itself, and passes the arguments when the run
folder is locked and everything has been checked.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import megatron_dsrl
from megatron_dsrl.common.process import launched_rank
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.platform.engine import ServerArguments, engine_environment
from megatron_dsrl.rollout.engines.address import API_KEY_VARIABLE
from megatron_dsrl.rollout.engines.server_arguments import engine_threads
from megatron_dsrl.rollout.engines.server_resources import end_processes, inherited_environment

SERVER_PROCESS = "megatron_dsrl.rollout.engines.server_process"
"""Module that runs as the server."""


class StartingServer:
    """A server process in its own session and process group. It ends with the thread that starts it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start the process. Main thread only, which stays alive.

        Args:
            environment: variables added to those of this process that are meant for the server too.
        """
        assert threading.current_thread() is threading.main_thread()
        # SGLang leaves its sockets in the temporary folder; its name is short because socket paths are limited.
        self.scratch = tempfile.TemporaryDirectory(prefix="dsrl-", ignore_cleanup_errors=True)
        """Removed by whoever ends the process."""
        self._output = Path(self.scratch.name, "output_before_serving")
        variables = {**inherited_environment(), "TMPDIR": self.scratch.name, **environment}
        variables.pop(API_KEY_VARIABLE, None)
        package_root = str(Path(megatron_dsrl.__file__).resolve().parents[1])
        search_path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(self._output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", SERVER_PROCESS, str(os.getpid())],
                env=variables | {"PYTHONPATH": os.pathsep.join(search_path)},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def serve(
        self, arguments: ServerArguments, environment: Mapping[str, str], key: str | None, log_file: Path
    ) -> None:
        """Have the process become the server; returns at once.

        Args:
            arguments: SGLang's `ServerArgs` fields.
            environment: further variables.
            key: what every caller must know; None: the server answers everybody.
            log_file: its output from now on is appended.
        """
        # Not arguments of the process, which every user of the machine could read.
        variables = {**environment, **({} if key is None else {API_KEY_VARIABLE: key})}
        order = {"arguments": arguments, "environment": variables, "log_file": str(log_file.resolve())}
        log_file.touch()
        assert self.process.stdin is not None
        try:
            with self.process.stdin as stream:
                stream.write(json.dumps(order).encode() + b"\n")
        except BrokenPipeError:
            pass  # it has ended, which the caller finds out like any later end

    def save_output(self, log_file: Path) -> None:
        """Append what the process wrote before it served, such as a failed import, to the log."""
        with suppress(FileNotFoundError):  # many machines remove old files from the temporary folder
            output = self._output.read_bytes()
            if output:
                with open(log_file, "ab") as log:
                    log.write(output)

    def discard(self) -> None:
        """End a process that is not needed."""
        end_processes(self.process)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.scratch.cleanup()


@contextmanager
def starting_server(config: RolloutSettings) -> Iterator[StartingServer | None]:
    """Start this rank's server process ahead of time, if it is to have one; it is ended if nobody makes it serve.

    Needs no torch.distributed. The model must be a local folder, or one whose config.json the package includes.
    """
    owns_engine = launched_rank() % config.engine.tensor_parallel_size == 0
    if config.engine.urls or not config.rollout.needs_engines or not owns_engine:
        yield None
        return
    server = StartingServer(engine_environment(config.engine.tensor_parallel_size, engine_threads(config)))
    try:
        yield server
    finally:
        if server.process.stdin is not None and not server.process.stdin.closed:
            server.discard()
