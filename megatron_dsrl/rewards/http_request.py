"""POST requests with retries, to servers that compute rewards and to judges.

Failed attempts are retried after 0.5, 1, 2, ... seconds, or as `Retry-After` says, at most a minute. A status 4xx other
than 408, 409 and 429 is final. Proxy environment variables are ignored.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.numbers import counted

LONGEST_PAUSE_SECONDS = 60.0
MAX_ANSWER_BYTES = 2**20
SHOWN_BYTES = 200
"""Bytes of an answer in messages."""
RETRIED_REFUSALS = frozenset({408, 409, 429})


@dataclass(frozen=True)
class Attempts:
    """Limits of a request."""

    try_timeout_seconds: float
    """Limit of one attempt."""
    retries: int
    """Retries after the first attempt."""
    total_seconds: float = float("inf")
    """No attempt begins after this, and the last one is cut short."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent in addition to the content type."""
    first_pause_seconds: float = 0.5
    """Pause before the second attempt; doubled before each later one."""


def post_json(url: str, body: Mapping[str, Any], attempts: Attempts) -> bytes:
    """The server's answer, at most `MAX_ANSWER_BYTES` of it. Raises RuntimeError, which names the last failure, if no
    attempt succeeded."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Content-Type": "application/json", **attempts.headers}
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers, method="POST")
    end = time.monotonic() + attempts.total_seconds
    for number in range(attempts.retries + 1):
        pause = attempts.first_pause_seconds * 2**number
        try:
            limit = min(attempts.try_timeout_seconds, max(end - time.monotonic(), 0.001))
            with opener.open(request, timeout=limit) as answered:
                return bytes(answered.read(MAX_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            failure = f"status {error.code}: {error.read(SHOWN_BYTES).decode(errors='replace')}"
            if 400 <= error.code < 500 and error.code not in RETRIED_REFUSALS:
                break
            wanted = error.headers.get("Retry-After", "")
            pause = float(wanted) if wanted.isdecimal() else pause  # else a date, its other form
        except (OSError, http.client.HTTPException) as error:  # refused, unreachable, timed out, cut off
            failure = repr(error)
        pause = min(pause, LONGEST_PAUSE_SECONDS)
        if number == attempts.retries or time.monotonic() + pause > end:
            break
        time.sleep(pause)
    raise RuntimeError(f"{url} did not answer after {counted(number + 1, 'attempt')}; last failure: {failure}")


def ask_chat_model(url: str, request: Mapping[str, Any], attempts: Attempts) -> str:
    """The text of a chat model's answer; may be empty.

    `url` is that of an OpenAI-compatible endpoint, such as SGLang's, up to and including `/v1`; the request has model,
    messages and sampling parameters. Raises RuntimeError like `post_json`, and ValueError if the answer is not a chat
    completion.
    """
    body = post_json(f"{url.rstrip('/')}/chat/completions", request, attempts)
    try:
        return json.loads(body)["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the endpoint's answer is not a chat completion: {body[:SHOWN_BYTES]!r}") from error


def require_http_address(option: str, url: str) -> None:
    """Raise UserError if an option is not an HTTP address, or holds a user name, which would not be sent."""
    parts = urlsplit(url)
    if parts.username is not None:
        raise UserError(f"{option}: expected http://host:port/path, without a user name and password")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{option}: expected http://host:port/path, got {url!r}")
