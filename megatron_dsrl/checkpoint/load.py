"""Find the checkpoint that a run continues from: the newest that is undamaged."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_dsrl.checkpoint.folders import STATE_FILE, Checkpoint, published
from megatron_dsrl.checkpoint.state import RunState, SavedState
from megatron_dsrl.common.checksum import changed_file
from megatron_dsrl.common.collective import broadcast, first_problem, my_share
from megatron_dsrl.common.errors import UserError


def newest_checkpoint(root: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint; None without checkpoints. Collective.

    Args:
        root: folder of the checkpoints.
        report: called on rank 0 with a message about each damaged checkpoint.

    Raises:
        UserError: all checkpoints are damaged. Raised on every rank.
    """
    folders = broadcast([folder for _, folder in reversed(published(root))])
    for folder in folders:
        problem, state = _validate(folder)
        if problem is None:
            assert state is not None
            return Checkpoint(folder, state)
        if dist.get_rank() == 0:
            report(f"checkpoint {folder} is damaged and ignored: {problem}")
    if folders:
        raise UserError(f"all checkpoints in {root} are damaged; remove the folder to start over from the first step")
    return None


def _validate(folder: Path) -> tuple[str | None, RunState | None]:
    """The problem with a checkpoint, if any, and its state, if readable. Ranks share the reading."""
    try:
        saved = SavedState.read(folder / STATE_FILE)
    except (OSError, ValueError) as error:
        return first_problem(f"{STATE_FILE}: {error}"), None
    problem = changed_file(folder, saved.files, my_share(sorted(saved.files)))
    return first_problem(problem), saved.run
