"""The program of an engine's subprocess: `python -m megatron_dsrl.rollout.server_process <JSON>`.

The JSON is a list of the parent's process id and SGLang's `ServerArgs` fields. The process dies with its parent, and
SGLang's scheduler and detokenizer processes, which ask the kernel for the same, die with it.
"""

import json
import sys

from megatron_dsrl.platform.engine import prepare_engine_process, run_scheduler_process
from megatron_dsrl.process import die_with_parent

# At import and not in main(): SGLang spawns its other processes, and a spawned process imports this module first.
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
