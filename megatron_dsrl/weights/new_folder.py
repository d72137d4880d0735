"""Create a folder atomically: several processes fill it, and it appears complete or not at all.

    .model.partial-abcd.lock    locked (flock) by the process that fills the folder, while it runs
    .model.partial-abcd         becomes `model`
    .model.partial-abcd.old     the previous `model`, during the replacement

A killed process loses its lock; the next one with the same target removes its leftovers. While a process holds its
lock, others with the same target are refused. If the target is a symbolic link, the folder it points to is replaced and
the link stays.
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
from megatron_dsrl.common.generated_card import CARD_FILE, has_mark
from megatron_dsrl.observability.records import PROVENANCE_FILE
from megatron_dsrl.weights.checkpoint_record import RECORD_FILE
from megatron_dsrl.weights.hf_writer import COMPANIONS, is_template_folder
from megatron_dsrl.weights.megatron_checkpoint import is_megatron_checkpoint

MODEL_FILES = (
    *("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", *COMPANIONS),
    *("metadata.json", ".metadata", "common.pt", "__*.distcp", RECORD_FILE, PROVENANCE_FILE),
)
"""The files that a conversion or an export writes. Anything else may be a user's work and is not deleted."""
NAMES_SHOWN = 3


@contextmanager
def new_folder(target: Path, overwrite: bool = False, needed: Sequence[Path] = ()) -> Iterator[Path]:
    """Create a folder, fill it in the `with` block, publish it at the end. Collective.

    The block writes into a hidden folder beside the target, which is renamed when all processes are done, and removed
    if rank 0 leaves the block with an exception. A failure in the block must therefore be raised on every process; see
    `together`. Leftovers of a killed process are removed by the next one with the same target. Yields the hidden
    folder, the same on every process. Raises UserError, on every process, if the target exists and may not be replaced,
    overlaps with `needed`, is being written by another process, or its parent is not writable.

    Args:
        overwrite: replace an existing target at the very end, provided it is empty or holds only a model. Otherwise an
            existing target is an error.
        needed: files and folders read meanwhile; the target must not be, contain or lie in one of them.
    """
    target = Path(os.path.realpath(target))
    lock: _Lock | None = None

    @_writing(target)
    def start() -> Path:
        nonlocal lock
        _refuse_what_is_needed(target, needed)
        _check_and_clean_up(target, overwrite)
        lock = _new_lock(target)
        lock.partial.mkdir()
        return lock.partial

    @_writing(target)
    def publish() -> None:
        assert lock is not None
        _publish(lock, target, overwrite)

    try:
        partial = on_first(start)
        yield partial
        barrier()  # everyone has written everything
        on_first(publish)
    finally:
        if rank() == 0 and lock is not None:
            _remove_leftovers(lock, target)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Context, also as a decorator, for what writes the target: raises UserError in place of OSError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the model to {target}: {error}") from error


@dataclass(frozen=True)
class _Lock:
    """A lock file beside the target. It outlives the folders that belong to it."""

    file: Path
    descriptor: int

    @property
    def partial(self) -> Path:
        """The folder that is being written."""
        return self.file.with_suffix("")

    @property
    def old(self) -> Path:
        """The former target, while it is replaced."""
        return self.file.with_suffix(".old")


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
    """Only a model may be replaced, and only on request."""
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError("it already exists; remove it or choose another folder")
    entries = sorted(target.iterdir())
    surplus = [entry.name for entry in entries if not _is_of_a_model(entry)]
    if surplus:
        shown = ", ".join(surplus[:NAMES_SHOWN]) + (", ..." if len(surplus) > NAMES_SHOWN else "")
        raise FileExistsError(f"it holds more than a model ({shown}) and is not replaced; choose another folder")
    has_weights = any(target.glob("*.safetensors")) or is_megatron_checkpoint(target)
    if entries and not (has_weights and (target / "config.json").exists()):  # a run's checkpoint has no config.json
        raise FileExistsError(
            "it holds neither an HF model (config.json and safetensors) nor a converted checkpoint (config.json and "
            "metadata.json) and is not replaced; remove it or choose another folder"
        )


def _is_of_a_model(entry: Path) -> bool:
    if entry.is_dir():
        return is_template_folder(entry)
    if entry.name == CARD_FILE:
        return has_mark(entry)
    return any(entry.match(pattern) for pattern in MODEL_FILES)


def _publish(lock: _Lock, target: Path, overwrite: bool) -> None:
    """Rename; an existing target is moved aside first, so the target is missing only for a moment."""
    _refuse_to_replace(target, overwrite)  # the target may have been created or changed meanwhile
    if not target.exists():
        lock.partial.rename(target)
        return
    target.rename(lock.old)
    try:
        lock.partial.rename(target)
    except OSError:
        lock.old.rename(target)
        raise


def _remove_leftovers(lock: _Lock, target: Path) -> None:
    """Remove folders and then the lock file. A previous target whose replacement was interrupted is restored."""
    if lock.old.exists() and not target.exists():
        lock.old.rename(target)
    shutil.rmtree(lock.old, ignore_errors=True)
    shutil.rmtree(lock.partial, ignore_errors=True)
    lock.file.unlink(missing_ok=True)
    os.close(lock.descriptor)


def _remove_what_killed_processes_left(target: Path) -> None:
    """Also refuses a target that a living process is writing."""
    for file in list(target.parent.iterdir()):
        if not (file.name.startswith(_prefix(target)) and file.suffix == ".lock"):
            continue
        with suppress(OSError):  # the file is gone, or the file system has no locks to tell whether its owner runs
            lock = _take(file, os.O_RDWR)
            if lock is not None:
                _remove_leftovers(lock, target)
                continue
        if file.exists() and _is_locked(file):
            raise FileExistsError(
                f"another process is writing to it ({file.name} is locked); wait for that one, or choose another folder"
            )


def _is_locked(file: Path) -> bool:
    """Whether another process holds the lock; False if the file system has no locks."""
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def _prefix(target: Path) -> str:
    return f".{target.name}.partial-"


def _new_lock(target: Path) -> _Lock:
    while True:
        lock = _take(target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}.lock"), os.O_RDWR | os.O_CREAT)
        if lock is not None:  # else another process removed it between creation and locking
            return lock


def _take(file: Path, flags: int) -> _Lock | None:
    """Lock a file; None if another process holds the lock or has just removed the file.

    If the file system has no locks, a file we created counts as locked: no other process can lock it either.
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
