"""A reward that an HTTP server computes.

POST {"response": ..., "answer": ...} as JSON; the server answers with a JSON object that has the reward in a field.
Failed attempts are retried after 0.5, 1, 2, ... seconds; when the last one fails the verifier raises, and the reward
pool counts an error. `reward.timeout_seconds` bounds all attempts together. Proxy environment variables are ignored.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from megatron_dsrl.common.errors import UserError

FIRST_PAUSE_SECONDS = 0.5
MAX_ANSWER_BYTES = 2**20


def remote(
    response: str, answer: str, url: str, try_timeout_seconds: float = 5.0, retries: int = 2, field: str = "reward"
) -> float:
    """The reward that the server returns.

    Args:
        response: The model's text.
        answer: The gold answer.
        url: `http://` or `https://` address.
        try_timeout_seconds: Limit of one attempt.
        retries: Further attempts after the first. A refusal (status 4xx) is final.
        field: Field of the server's answer with the reward.

    Raises:
        RuntimeError: No attempt returned a reward; names the last failure.
    """
    body = json.dumps({"response": response, "answer": answer}).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for number in range(retries + 1):
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"}, method="POST")
        try:
            with opener.open(request, timeout=try_timeout_seconds) as answered:
                return _reward(answered.read(MAX_ANSWER_BYTES), field, url)
        except urllib.error.HTTPError as error:
            failure = f"status {error.code}"
            if 400 <= error.code < 500:
                break
        except OSError as error:  # refused, unreachable, timed out
            failure = repr(error)
        if number < retries:
            time.sleep(FIRST_PAUSE_SECONDS * 2**number)
    raise RuntimeError(f"{url} gave no reward in {number + 1} tries; the last one ended with {failure}")


def check_url(options: Mapping[str, Any]) -> None:
    """Validate the options of `remote`.

    Raises:
        UserError: The URL is not an HTTP address, or holds a user name, which would not be sent.
    """
    parts = urlsplit(options["url"])
    if parts.username is not None:
        raise UserError("reward.options.url: expected http://host:port/path, without a user name and password")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"reward.options.url: expected http://host:port/path, got {options['url']!r}")


def _reward(body: bytes, field: str, url: str) -> float:
    try:
        return float(json.loads(body)[field])
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{url} answered without a number in `{field}`: {body[:200]!r}") from error
