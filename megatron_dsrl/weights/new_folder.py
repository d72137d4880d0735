"""A folder that several processes fill and that appears complete or not at all.

    .model.partial-abcd.lock    locked (flock) by the process that fills the folder, for as long as it lives
    .model.partial-abcd         what becomes `model`
    .model.partial-abcd.old     the former `model`, for the moment of the replacement

A process that is killed loses its lock; the next one with the same target then removes what it has left. A target that
is a symbolic link stands for the folder it leads to; the link stays.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_dsrl.common.collective import barrier, on_first, rank
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.provenance.records import PROVENANCE_FILE
from megatron_dsrl.weights.checkpoint_record import RECORD_FILE
from megatron_dsrl.weights.companions import COMPANIONS
from megatron_dsrl.weights.megatron_checkpoint import is_megatron_checkpoint

MODEL_FILES = (
    *("config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS),
    *("metadata.json", ".metadata", "common.pt", "*.distcp", RECORD_FILE),
    *("README.md", "LICENSE*", ".gitattributes", PROVENANCE_FILE),
)
"""What HF folders and Megatron checkpoints consist of; most of the last ones come with a model from the hub."""
NAMES_SHOWN = 3


@contextmanager
def new_folder(target: Path, overwrite: bool = False, needed: Sequence[Path] = ()) -> Iterator[Path]:
    """Make a folder, fill it in the body of the `with`, publish it at its end. Collective.

    The body writes into a hidden folder beside the target, which is renamed when all processes are through, and removed
    when rank 0 leaves the body by an exception: what fails in the body must fail on every process, see `together`. What
    a process left that was killed at once is removed by the next one with the same target.

    Args:
        target: the folder to be; its parents are made as needed.
        overwrite: an existing target is replaced at the very end, if it is empty or a model and nothing else; without
            it, it is an error.
        needed: files and folders that are read meanwhile: the target must not be one, contain one or lie in one.

    Yields:
        The hidden folder, the same on every process.

    Raises:
        UserError: the target exists and is not to be replaced, is mixed up with what is needed, or its parent cannot be
            written to. On every process.
    """
    target = Path(os.path.realpath(target))
    lock: _Lock | None = None

    def begin() -> Path:
        nonlocal lock
        try:
            _refuse_what_is_needed(target, needed)
            _check_and_clean_up(target, overwrite)
            lock = _new_lock(target)
            lock.partial.mkdir()
            return lock.partial
        except OSError as error:
            raise UserError(f"cannot write the model to {target}: {error}") from error

    def publish() -> None:
        try:
            _publish(partial, target, overwrite)
        except OSError as error:
            raise UserError(f"cannot write the model to {target}: {error}") from error

    try:
        partial = on_first(begin)
        yield partial
        barrier()  # everyone has written everything
        on_first(publish)
    finally:
        if rank() == 0 and lock is not None:
            _remove_leftovers(lock, target)


@dataclass(frozen=True)
class _Lock:
    """A lock file beside the target. It exists longer than the folders that belong to it."""

    file: Path
    descriptor: int

    @property
    def partial(self) -> Path:
        return self.file.with_name(self.file.name.removesuffix(".lock"))

    @property
    def old(self) -> Path:
        return _old(self.partial)


def _old(partial: Path) -> Path:
    return partial.with_name(partial.name + ".old")


def _refuse_what_is_needed(target: Path, needed: Sequence[Path]) -> None:
    for path in needed:
        real = Path(os.path.realpath(path))
        for wrong, relation in (
            (real == target, "it is"),
            (target in real.parents, "it contains"),
            (real in target.parents, "it lies in"),
        ):
            if wrong:
                raise FileExistsError(f"{relation} {path}, which the conversion reads; choose another folder")


def _check_and_clean_up(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError("it is a file, not a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_what_killed_processes_left(target)
    _refuse_to_replace(target, overwrite)


def _refuse_to_replace(target: Path, overwrite: bool) -> None:
    """Only a model may be lost, and only by intention."""
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError("it exists already; remove it or choose another folder")
    entries = sorted(target.iterdir())
    surplus = [x.name for x in entries if x.is_dir() or not any(x.match(pattern) for pattern in MODEL_FILES)]
    if surplus:
        shown = ", ".join(surplus[:NAMES_SHOWN]) + (", ..." if len(surplus) > NAMES_SHOWN else "")
        raise FileExistsError(f"it holds more than a model ({shown}) and is not replaced; choose another folder")
    has_weights = any(target.glob("*.safetensors")) or is_megatron_checkpoint(target)
    if entries and not (has_weights and (target / "config.json").exists()):  # a run's checkpoint has no config.json
        raise FileExistsError(
            "it holds neither an HF model (config.json and safetensors) nor a converted checkpoint (config.json and "
            "metadata.json) and is not replaced; remove it or choose another folder"
        )


def _publish(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename; a folder in the way steps aside first, so that the target is whole at any moment but one."""
    _refuse_to_replace(target, overwrite)  # the target may have come, or changed, meanwhile
    if not target.exists():
        partial.rename(target)
        return
    target.rename(_old(partial))
    try:
        partial.rename(target)
    except OSError:
        _old(partial).rename(target)
        raise


def _remove_leftovers(lock: _Lock, target: Path) -> None:
    """The lock file last. A former target that was just being replaced goes back to its place."""
    if lock.old.exists() and not target.exists():
        lock.old.rename(target)
    shutil.rmtree(lock.old, ignore_errors=True)
    shutil.rmtree(lock.partial, ignore_errors=True)
    lock.file.unlink(missing_ok=True)
    os.close(lock.descriptor)


def _remove_what_killed_processes_left(target: Path) -> None:
    for file in _siblings(target):
        with suppress(OSError):  # it is gone, or the file system knows no locks: then nobody can tell who lives
            lock = _take(file, os.O_RDWR)
            if lock is not None:
                _remove_leftovers(lock, target)


def _siblings(target: Path) -> list[Path]:
    """Lock files of all processes that fill or filled this target."""
    prefix = _prefix(target)
    return [file for file in target.parent.iterdir() if file.name.startswith(prefix) and file.suffix == ".lock"]


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _new_lock(target: Path) -> _Lock:
    while True:
        lock = _take(target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}.lock"), os.O_RDWR | os.O_CREAT)
        if lock is not None:  # else another process has cleaned it away in the moment between making and locking it
            return lock


def _take(file: Path, flags: int) -> _Lock | None:
    """Lock a file; None if another process holds it, or has just removed it.

    Where the file system has no locks, a file of our own counts as locked: no other process can lock it either.
    """
    descriptor = os.open(file, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
            return _Lock(file, descriptor)
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        if flags & os.O_CREAT:
            return _Lock(file, descriptor)
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
