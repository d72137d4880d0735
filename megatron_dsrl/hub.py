"""What the hub (Hugging Face's, or a mirror of it) does not give, and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dsrl.errors import UserError

_GATED = "access to it must be asked for; do so on its page, and set HF_TOKEN to a token of that account"
_UNKNOWN = "there is none of that name, or it is private; correct the name, or set HF_TOKEN to a token that may read it"
_FETCH_ELSEWHERE = (
    "fetch it where there is a network and name its folder or file here, or copy the cache (HF_HOME); HF_ENDPOINT is "
    "the address of another hub"
)


@contextmanager
def asking_hub(field: str, name: str, expected: str) -> Iterator[None]:
    """Make one message of whatever the hub's clients raise in the body.

    Args:
        field: that names it, of the configuration or the command line.
        name: on the hub.
        expected: what it could have been, such as `a folder nor a model`.

    Raises:
        UserError: in place of any other exception; says what is wrong and what to do.
    """
    try:
        yield
    except Exception as error:  # their kinds are a dozen, from HTTP to missing cache entries, and are no one's children
        raise UserError(f"{field}: {name!r} is neither {expected} that the hub gives: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    from huggingface_hub.constants import ENDPOINT, is_offline_mode

    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    if "GatedRepoError" in kinds or ("DatasetNotFoundError" in kinds and "gated" in str(error)):
        return _GATED
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return _UNKNOWN
    if kinds & {"LocalEntryNotFoundError", "ConnectionError", "TransportError"}:
        if is_offline_mode():
            return f"HF_HUB_OFFLINE is set, and it is not in the cache; {_FETCH_ELSEWHERE}"
        return f"{ENDPOINT} cannot be reached, and it is not in the cache; {_FETCH_ELSEWHERE}"
    return f"{type(error).__name__}: {error}"
