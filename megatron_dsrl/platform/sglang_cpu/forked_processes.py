"""Fork the scheduler and detokenizer of an engine on CPU from its server, which has already imported SGLang.

SGLang spawns them, since CUDA does not survive a fork. Each would import SGLang again, which takes longer than the rest
of a tiny engine's start.
"""

import multiprocessing
from multiprocessing.context import ForkContext, ForkProcess

from sglang.srt.entrypoints import engine

from megatron_dsrl.common.process import die_with_parent


class EngineProcess(ForkProcess):
    """A process that dies with the server."""

    def run(self) -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None
        die_with_parent(parent.pid)
        super().run()


class EngineContext(ForkContext):
    """Replaces the module `multiprocessing` in SGLang's launcher."""

    Process = EngineProcess

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """Set the start method for other processes that the server starts with `multiprocessing`."""
        multiprocessing.set_start_method(method, force)


def register() -> None:
    """Make the engine launched by this process fork its processes."""
    engine.mp = EngineContext()
