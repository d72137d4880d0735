"""The program of an engine's subprocess: `python -m megatron_dsrl.rollout.server_process <JSON>`.

The JSON is a list of the parent's process id and SGLang's `ServerArgs` fields. The process dies with its parent, and
SGLang's scheduler and detokenizer processes die with it.
"""

import json
import os
import sys

from megatron_dsrl.platform.engine import prepare_engine_process, run_scheduler_process
from megatron_dsrl.process import die_with_parent


def prepare_spawned_process() -> None:
    """Tie a process that SGLang spawned to the server.

    SGLang asks the same of the kernel, but seconds later, when its imports are done; a server that is killed in
    between would leave the process behind.
    """
    server = os.getppid()
    if os.getpgid(server) != os.getpgrp():  # the server, which leads our process group, has ended already
        os._exit(1)
    die_with_parent(server)


# A spawned process imports this module first, under this name, and SGLang only afterwards.
if __name__ == "__mp_main__":
    prepare_spawned_process()
prepare_engine_process()


def main() -> None:
    """Start SGLang's HTTP server; returns when it was told to stop."""
    parent, arguments = json.loads(sys.argv[1])
    die_with_parent(parent)

    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    launch_server(ServerArgs(**arguments), run_scheduler_process_func=run_scheduler_process)


if __name__ == "__main__":
    main()
