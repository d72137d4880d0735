"""A reward that an HTTP server computes.

POST {"response": ..., "answer": ...} as JSON; the server answers with a JSON object that has the reward in a field.
When the last attempt fails the verifier raises, and the reward pool counts an error. `reward.timeout_seconds` bounds
all attempts together.
"""

import json
from collections.abc import Mapping
from typing import Any

from megatron_dsrl.rewards.http_request import Attempts, post_json, require_http_address
from megatron_dsrl.rewards.registry import Fields


def remote(
    response: str, answer: str, url: str, try_timeout_seconds: float = 5.0, retries: int = 2, field: str = "reward"
) -> float:
    """The reward that the server returns.

    Args:
        url: `http://` or `https://` address.
        try_timeout_seconds: limit of one attempt.
        retries: number of retries after the first attempt.
        field: field of the server's answer with the reward.

    Raises:
        RuntimeError: no attempt returned a reward; names the last failure.
    """
    body = post_json(url, {"response": response, "answer": answer}, Attempts(try_timeout_seconds, retries))
    try:
        return float(json.loads(body)[field])
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{url} answered without a number in `{field}`: {body[:200]!r}") from error


def check_url(options: Mapping[str, Any], fields: Fields) -> None:
    """Raise UserError if the URL is not an HTTP address, or holds a user name, which would not be sent."""
    require_http_address(f"{fields.options}.url", options["url"])
