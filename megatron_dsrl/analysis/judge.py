"""A judge model behind an OpenAI-compatible endpoint, such as one that SGLang serves: many questions, some at a time.

A question is tried again after 1, 2, 4, ... seconds (or what `Retry-After` says) when the connection fails, the time is
over, or the server answers with status 408, 409, 429 or 5xx. Any other refusal is final for that question.
"""

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from megatron_dsrl.common.errors import UserError

Messages = list[dict[str, str]]

_RETRIED_STATUSES = frozenset({408, 409, 429})
_LONGEST_PAUSE_SECONDS = 60.0
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class JudgeEndpoint:
    """Where the judge is, and the limits that its client keeps."""

    url: str
    """Up to and including `/v1`."""
    model: str
    """As the endpoint calls it."""
    api_key: str | None = None
    """Sent as bearer token."""
    concurrency: int = 16
    """Questions under way at a time."""
    timeout_seconds: float = 300.0
    """Of one try."""
    retries: int = 5
    """Further tries of a question after a failed one."""
    first_pause_seconds: float = 1.0
    """Before the second try; doubled before each further one."""
    max_tokens: int = 2048
    """Of an answer."""

    def check(self) -> None:
        """
        Raises:
            UserError: the address is none of HTTP.
        """
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--url: expected an address such as http://127.0.0.1:30000/v1, given {self.url!r}")


class _Refused(Exception):
    """A try failed for good."""


class _Failed(Exception):
    """A try failed; another one may not."""

    def __init__(self, message: str, pause_seconds: float | None = None):
        super().__init__(message)
        self.pause_seconds = pause_seconds


def ask_all(
    endpoint: JudgeEndpoint,
    questions: Mapping[Hashable, Messages],
    on_answer: Callable[[Any, str], None],
) -> dict[Hashable, str]:
    """Ask every question at temperature 0.

    Args:
        endpoint: whom.
        questions: chats by key.
        on_answer: called with key and text of every answer as it comes.

    Returns:
        What the last try said, of each question that got no answer.

    Raises:
        UserError: the address is none of HTTP.
    """
    endpoint.check()
    return asyncio.run(_ask_all(endpoint, questions, on_answer))


async def _ask_all(
    endpoint: JudgeEndpoint,
    questions: Mapping[Hashable, Messages],
    on_answer: Callable[[Any, str], None],
) -> dict[Hashable, str]:
    failures: dict[Hashable, str] = {}
    waiting = iter(questions.items())
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    timeout = aiohttp.ClientTimeout(total=endpoint.timeout_seconds)

    async def work(session: aiohttp.ClientSession) -> None:
        for key, messages in waiting:  # shared by all workers: each takes the next question
            try:
                on_answer(key, await _ask(session, endpoint, messages))
            except (_Refused, _Failed) as failure:
                failures[key] = str(failure)

    connector = aiohttp.TCPConnector(limit=endpoint.concurrency)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(endpoint.concurrency, len(questions))):
                group.create_task(work(session))
    return failures


async def _ask(session: aiohttp.ClientSession, endpoint: JudgeEndpoint, messages: Messages) -> str:
    """
    Raises:
        _Refused: no further try would help.
        _Failed: the last try failed.
    """
    for number in range(endpoint.retries):
        try:
            return await _try(session, endpoint, messages)
        except _Failed as failure:
            pause = failure.pause_seconds
            pause = endpoint.first_pause_seconds * 2**number if pause is None else pause
            await asyncio.sleep(min(pause, _LONGEST_PAUSE_SECONDS))
    return await _try(session, endpoint, messages)


async def _try(session: aiohttp.ClientSession, endpoint: JudgeEndpoint, messages: Messages) -> str:
    body = {
        "model": endpoint.model,
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": endpoint.max_tokens,
    }
    try:
        async with session.post(f"{endpoint.url.rstrip('/')}/chat/completions", json=body) as reply:
            text = await reply.text(errors="replace")
            if reply.status != 200:
                message = f"status {reply.status}: {text[:_SHOWN_CHARACTERS]}"
                if reply.status in _RETRIED_STATUSES or reply.status >= 500:
                    raise _Failed(message, _seconds(reply.headers.get("Retry-After")))
                raise _Refused(message)
            data = await reply.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _Failed(f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        raise _Failed(f"the endpoint did not answer in JSON: {text[:_SHOWN_CHARACTERS]}") from error
    return _content(data)


def _content(data: Any) -> str:
    """The text of the first choice; empty where the model gave none."""
    try:
        return data["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise _Refused(f"the endpoint's answer is not a chat completion: {str(data)[:_SHOWN_CHARACTERS]}") from error


def _seconds(header: str | None) -> float | None:
    """`Retry-After` as a number of seconds; its other form, a date, is not used."""
    return float(header) if header is not None and header.isdecimal() else None


def first_failures(failures: Mapping[Hashable, str], count: int = 3) -> Sequence[str]:
    """Different messages among the failures, most frequent first."""
    messages = list(failures.values())
    return sorted(set(messages), key=lambda message: -messages.count(message))[:count]
