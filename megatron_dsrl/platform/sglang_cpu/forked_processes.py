"""Scheduler and detokenizer of an engine on CPU: forks of its server, which has imported SGLang already.

SGLang spawns them, since CUDA does not survive a fork; each then imports SGLang again, which takes longer than all the
rest of a tiny engine's start.
"""

import multiprocessing
from multiprocessing.context import ForkContext, ForkProcess

from sglang.srt.entrypoints import engine

from megatron_dsrl.common.process import die_with_parent


class EngineProcess(ForkProcess):
    """A process that dies with the server."""

    def run(self) -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        die_with_parent(parent.pid)
        super().run()


class EngineContext(ForkContext):
    """What SGLang's launcher takes for the module `multiprocessing`."""

    Process = EngineProcess

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """Holds for what else the server starts by `multiprocessing`."""
        multiprocessing.set_start_method(method, force)


def register() -> None:
    """Fork the processes of the engine that this process is going to launch."""
    engine.mp = EngineContext()
