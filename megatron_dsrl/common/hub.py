"""What the hub (Hugging Face's, or a mirror of it) does not give, and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from megatron_dsrl.common.errors import UserError

REACH_SECONDS = 5.0
"""Within which the hub must answer; its clients would try for half a minute."""

_FETCH_ELSEWHERE = (
    "fetch it where there is a network and name its folder or file here, or copy the cache (HF_HOME); HF_ENDPOINT "
    "names another hub"
)


@cache
def can_reach_hub() -> bool:
    """Whether the hub answers at all. Asked once per process; without it, only its cache is read."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.utils import get_session

    try:
        get_session().head(ENDPOINT, timeout=REACH_SECONDS)
    except Exception:  # its kinds depend on the client's version; HF_HUB_OFFLINE raises one too
        return False
    return True


@contextmanager
def asking_hub(field: str, name: str, kind: str = "model", local: str = "folder") -> Iterator[None]:
    """Turn any exception of the hub's clients in the body into one message.

    Args:
        field: that names it, of the configuration or the command line.
        name: on the hub.
        kind: what was looked for on the hub.
        local: what it could have been instead, on this machine.

    Raises:
        UserError: in place of any other exception; says what is wrong and what to do.
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
    """Names of the classes, with those that they derive from, of an exception and of all that it was raised from."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return {kind.__name__ for cause in causes for kind in type(cause).__mro__}
