"""The program of an engine's subprocess: `python -m megatron_dsrl.rollout.engines.server_process <JSON>`.

The JSON is a list of the parent's process id and SGLang's `ServerArgs` fields. The process dies with its parent, and
SGLang's scheduler and detokenizer processes die with it.
"""

import json
import os
import sys
import traceback

from megatron_dsrl.common.process import die_with_parent


def tie_to_parent() -> None:
    """Tie this process, the server or one that it spawned, to the one that started it.

    SGLang asks the same of the kernel for its spawned processes, but only when their imports are done, seconds later:
    a server that is killed in between would leave them behind.
    """
    if __name__ == "__main__":
        die_with_parent(json.loads(sys.argv[1])[0])
        return
    server = os.getppid()
    if os.getpgid(server) != os.getpgrp():  # the server, which leads our process group, has ended already
        os._exit(1)
    die_with_parent(server)


# A spawned process imports this module first, under the name __mp_main__, and SGLang afterwards. The next import takes
# a second or more, so it comes after.
if __name__ in ("__main__", "__mp_main__"):
    tie_to_parent()

from megatron_dsrl.platform.engine import (  # noqa: E402
    prepare_engine_launch,
    prepare_engine_process,
    run_scheduler_process,
    skip_warmup,
)

prepare_engine_process()


def main() -> None:
    """Start SGLang's HTTP server; returns when it was told to stop."""
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    from megatron_dsrl.rollout.engines.credentials import API_KEY_VARIABLE

    arguments = json.loads(sys.argv[1])[1]
    if API_KEY_VARIABLE in os.environ:  # not an argument of this program, which every user of the machine can read
        arguments = {"api_key": os.environ[API_KEY_VARIABLE]} | arguments
    prepare_engine_launch()
    try:
        launch_server(
            ServerArgs(**arguments),
            run_scheduler_process_func=run_scheduler_process,
            execute_warmup_func=skip_warmup,
        )
    except Exception:
        # A normal exit would first wait for SGLang's other processes, which do not end when a scheduler has died.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
