"""A folder that several processes fill and that appears complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dsrl.errors import UserError
from megatron_dsrl.weights.collective import barrier, on_first, rank


@contextmanager
def new_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Make a folder, fill it in the body of the `with`, publish it at its end. Collective.

    The body writes into a hidden folder beside the target, which is renamed when all processes are through, and removed
    when rank 0 leaves the body by an exception: what fails in the body must fail on every process, see `together`. Only
    a process killed at once, with no time to clean up, leaves the hidden folder behind.

    Args:
        target: the folder to be; its parents are made as needed.
        overwrite: an existing target is replaced at the very end; without it, it is an error.

    Yields:
        The hidden folder, the same on every process.

    Raises:
        UserError: the target exists and is not to be replaced, or its parent cannot be written to. On every process.
    """
    partial = on_first(lambda: _make_partial(target, overwrite))
    try:
        yield partial
        barrier()  # everyone has written everything
        on_first(lambda: _publish(partial, target))
    except BaseException:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _make_partial(target: Path, overwrite: bool) -> Path:
    try:
        if target.exists() and not overwrite:
            raise FileExistsError("it exists already; remove it or choose another folder")
        if target.exists() and not target.is_dir():
            raise FileExistsError("it is a file, not a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        partial.chmod(0o777 & ~_current_umask())  # mkdtemp's are private, the renamed folder should not be
    except OSError as error:
        raise UserError(f"cannot write the model to {target}: {error}") from error
    return partial


def _publish(partial: Path, target: Path) -> None:
    """Rename; a folder in the way steps aside first, so that the target is whole at any moment but one."""
    if not target.exists():
        partial.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
    target.rename(aside / target.name)
    try:
        partial.rename(target)
    except OSError:
        (aside / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
