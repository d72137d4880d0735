"""Access to the hub (Hugging Face or a mirror): is it reachable, and what to do if it does not have something."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from megatron_dsrl.common.errors import UserError

REACH_SECONDS = 5.0
"""Time limit for the hub to answer; its own clients would retry for half a minute."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Start of what `git clone` leaves in place of large files if Git LFS is not installed."""
_FETCH_ELSEWHERE = (
    "download it on a machine with a network and name its folder or file here, or copy the cache (HF_HOME); "
    "HF_ENDPOINT selects another hub"
)


@cache
def can_reach_hub() -> bool:
    """Whether the hub answers; checked once per process. If not, only its cache is used."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.utils import get_session

    try:
        get_session().head(ENDPOINT, timeout=REACH_SECONDS)
    except Exception:  # exception types depend on the client's version; HF_HUB_OFFLINE raises one too
        return False
    return True


@contextmanager
def asking_hub(field: str, name: str, kind: str = "model", local: str = "folder") -> Iterator[None]:
    """Turn any exception of the hub's clients in the body into one UserError, which says what is wrong and what to do.

    `field` is the configuration field or command-line argument, and `local` what `name` could have been on this
    machine.
    """
    try:
        yield
    except Exception as error:  # hub clients raise a dozen unrelated exception types
        raise UserError(f"{field}: {name!r} is not a local {local}, and {_explain(error, kind)}") from error


def _explain(error: Exception, kind: str) -> str:
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    kinds = kinds_of_causes(error)
    if "GatedRepoError" in kinds or ("DatasetNotFoundError" in kinds and "gated" in str(error)):
        return f"the hub's {kind} is gated: request access on its page, and set HF_TOKEN to a token of that account"
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return f"the hub has no such {kind} that you can read: check the name, or set HF_TOKEN if it is private"
    if kinds & {"LocalEntryNotFoundError", "ConnectionError", "TransportError"}:
        if is_offline_mode():
            return f"HF_HUB_OFFLINE is set and the hub's cache does not have it: {_FETCH_ELSEWHERE}"
        return f"{ENDPOINT} cannot be reached and the hub's cache does not have it: {_FETCH_ELSEWHERE}"
    return f"reading it from the hub failed: {type(error).__name__}: {error}"


def kinds_of_causes(error: BaseException) -> set[str]:
    """Names of the classes, base classes included, of an exception and its causes."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return {kind.__name__ for cause in causes for kind in type(cause).__mro__}


def lfs_advice(file: Path) -> str | None:
    """What to do about a file that is only a pointer; None if it is not one."""
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return None
    if not is_pointer:
        return None
    return f"it is a Git LFS pointer, not the file itself; install Git LFS and run `git lfs pull` in {file.parent}"
