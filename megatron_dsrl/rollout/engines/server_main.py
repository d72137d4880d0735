"""Entry point of an engine's subprocess: `python -m megatron_dsrl.rollout.engines.server_main PARENT`.

PARENT is the process id of the trainer. The process imports SGLang and then waits for a line on standard input: a JSON
object with SGLang's `ServerArgs` fields, additional environment variables and the log file; see `server_process.py`.
It dies with its parent, and SGLang's scheduler and detokenizer processes die with it.
"""

import json
import os
import re
import sys
import traceback
from typing import Any, NoReturn

from megatron_dsrl.common.process import die_with_parent


def tie_to_parent() -> None:
    """Make this process, the server or one that it spawned, die with the process that started it.

    SGLang does the same for its spawned processes, but only after their imports, seconds later: a server killed in
    between would leave them behind.
    """
    if __name__ == "__main__":
        die_with_parent(int(sys.argv[1]))
        return
    server = os.getppid()
    if os.getpgid(server) != os.getpgrp():  # the server, which leads our process group, has already exited
        os._exit(1)
    die_with_parent(server)


# A spawned process imports this module first, under the name __mp_main__, and SGLang afterwards. The import below takes
# a second or more, so the process is tied to its parent first.
if __name__ in ("__main__", "__mp_main__"):
    tie_to_parent()

from megatron_dsrl.common.held_port import PORT_LOST_STATUS  # noqa: E402
from megatron_dsrl.platform import engine_process  # noqa: E402

engine_process.prepare_engine_process()


def main() -> None:
    """Run SGLang's HTTP server until it is told to stop."""
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    from megatron_dsrl.rollout.engines.address import API_KEY_VARIABLE
    from megatron_dsrl.rollout.engines.packed_answers import register_route

    order = read_order()
    os.environ.update(order["environment"])
    arguments = order["arguments"]
    if API_KEY_VARIABLE in os.environ:
        arguments = {"api_key": os.environ[API_KEY_VARIABLE]} | arguments
    rendezvous = engine_process.prepare_engine_launch()
    register_route()
    try:
        launch_server(
            ServerArgs(**arguments),
            run_scheduler_process_func=engine_process.run_scheduler_process,
            execute_warmup_func=engine_process.skip_warmup,
        )
    except SystemExit:  # how uvicorn ends when it cannot open the port, after a line in the log
        exit_now(PORT_LOST_STATUS)
    except Exception as error:
        traceback.print_exc()
        exit_now(exit_status(error))
    del rendezvous  # the store is needed until the server has ended


def read_order() -> dict[str, Any]:
    """Wait for the parent's line, then write to the log file. Exits if the parent does not need this server."""
    line = sys.stdin.buffer.readline()
    if not line:
        exit_now(0)
    order: dict[str, Any] = json.loads(line)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log_file"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    return order


def exit_status(error: Exception) -> int:
    """128 and the number of the signal that killed a scheduler while it started, as SGLang reports it; otherwise 1."""
    killed = re.search(r"scheduler died during initialization \(exit code: -(\d+)\)", str(error))
    return 128 + int(killed[1]) if killed else 1


def exit_now(status: int) -> NoReturn:
    """Exit without waiting for SGLang's other processes, which do not end when the server has failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
