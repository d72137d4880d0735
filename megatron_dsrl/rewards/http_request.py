"""POST requests with retries, for rewards that servers compute.

Failed attempts are retried after 0.5, 1, 2, ... seconds, or as `Retry-After` says. A status 4xx other than 408, 409 and
429 is final. Proxy environment variables are ignored.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from megatron_dsrl.common.errors import UserError

FIRST_PAUSE_SECONDS = 0.5
MAX_ANSWER_BYTES = 2**20
RETRIED_REFUSALS = frozenset({408, 409, 429})


@dataclass(frozen=True)
class Attempts:
    """Limits of a request."""

    try_timeout_seconds: float
    """Limit of one attempt."""
    retries: int
    """Further attempts after the first."""
    total_seconds: float = float("inf")
    """No attempt begins after this, and the last one is cut short."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent in addition to the content type."""


def post_json(url: str, body: Mapping[str, Any], attempts: Attempts) -> bytes:
    """The server's answer, at most `MAX_ANSWER_BYTES` of it.

    Raises:
        RuntimeError: no attempt succeeded; names the last failure.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json", **attempts.headers}
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers, method="POST")
    end = time.monotonic() + attempts.total_seconds
    for number in range(attempts.retries + 1):
        pause = FIRST_PAUSE_SECONDS * 2**number
        try:
            limit = min(attempts.try_timeout_seconds, max(end - time.monotonic(), 0.001))
            with opener.open(request, timeout=limit) as answered:
                return bytes(answered.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            failure = f"status {error.code}"
            if 400 <= error.code < 500 and error.code not in RETRIED_REFUSALS:
                break
            pause = _retry_after(error.headers.get("Retry-After"), pause)
        except OSError as error:  # refused, unreachable, timed out
            failure = repr(error)
        if number == attempts.retries or time.monotonic() + pause > end:
            break
        time.sleep(pause)
    raise RuntimeError(f"{url} gave no reward in {number + 1} tries; the last one ended with {failure}")


def require_http_address(option: str, url: str) -> None:
    """Check an address in the options of a verifier.

    Raises:
        UserError: `url` is not an HTTP address, or holds a user name, which would not be sent.
    """
    parts = urlsplit(url)
    if parts.username is not None:
        raise UserError(f"{option}: expected http://host:port/path, without a user name and password")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{option}: expected http://host:port/path, got {url!r}")


def _retry_after(header: str | None, otherwise: float) -> float:
    """Seconds to wait; `otherwise` if the header is missing or a date, its other form."""
    return float(header) if header is not None and header.isdecimal() else otherwise
