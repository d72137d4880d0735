"""Announce the loading of PyTorch, Transformers and Megatron, which takes seconds, and hide their known warnings."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from megatron_dsrl.common.process import launched_rank
from megatron_dsrl.common.waiting import waiting


@contextmanager
def loading_megatron(stream: TextIO | None = None, what: str = "PyTorch and Megatron") -> Iterator[None]:
    """Context for the block in which a command imports them. `stream` is where rank 0 prints: standard output by
    default, stderr for commands whose output is data."""

    def say(text: str) -> None:
        if launched_rank() == 0:
            print(text, file=stream or sys.stdout, flush=True)

    with waiting(f"loading {what}", say=say):
        from megatron_dsrl.platform import current_platform, silence_expected_warnings

        silence_expected_warnings()
        current_platform().prepare_imports()
        yield
