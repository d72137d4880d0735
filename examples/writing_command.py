"""The shared end of commands that write a folder."""

import sys
from collections.abc import Callable
from pathlib import Path

from megatron_dsrl.common.errors import UserError


def run_writing(write: Callable[[], None], output: Path) -> int:
    """Call `write` and print the folder that it wrote.

    Returns:
        Exit status: 2 after a UserError, which is printed to stderr.
    """
    try:
        write()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {output}")
    return 0
