"""Client of a judge model behind an OpenAI-compatible endpoint, such as SGLang's, with limited concurrency.

A question is retried after 1, 2, 4, ... seconds (or as `Retry-After` says) if the connection fails, the time limit
expires, or the server answers with status 408, 409, 429 or 5xx. Any other refusal is final for that question.
"""

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp

from megatron_dsrl.common.chat_completion import completion_text
from megatron_dsrl.common.errors import UserError

Messages = list[dict[str, str]]
Key = TypeVar("Key", bound=Hashable)

_RETRIED_STATUSES = frozenset({408, 409, 429})
_LONGEST_PAUSE_SECONDS = 60.0
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class JudgeEndpoint:
    """Address of the judge, and the client's limits."""

    url: str
    """Up to and including `/v1`."""
    model: str
    """Model name at the endpoint."""
    api_key: str | None = None
    """Sent as a bearer token."""
    concurrency: int = 16
    """Number of questions in flight."""
    timeout_seconds: float = 300.0
    """Limit of one attempt."""
    retries: int = 5
    """Further attempts after the first."""
    first_pause_seconds: float = 1.0
    """Pause before the second attempt; doubled before each further one."""
    max_tokens: int = 2048
    """Length limit of an answer."""

    def check(self) -> None:
        """Validate the address.

        Raises:
            UserError: the URL is not an HTTP address.
        """
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--url: expected an address such as http://127.0.0.1:30000/v1, got {self.url!r}")


class _Refused(Exception):
    """An attempt failed, and retrying would not help."""


class _Failed(Exception):
    """An attempt failed, but another may succeed."""

    def __init__(self, message: str, pause_seconds: float | None = None) -> None:
        super().__init__(message)
        self.pause_seconds = pause_seconds


def ask_all(
    endpoint: JudgeEndpoint,
    questions: Mapping[Key, Messages],
    on_answer: Callable[[Key, str], None],
) -> dict[Key, str]:
    """Ask every question at temperature 0.

    Args:
        questions: chats by key.
        on_answer: called with key and text of every answer as it arrives.

    Returns:
        The last error of each question that got no answer.

    Raises:
        UserError: the URL is not an HTTP address.
    """
    endpoint.check()
    return asyncio.run(_ask_all(endpoint, questions, on_answer))


async def _ask_all(
    endpoint: JudgeEndpoint,
    questions: Mapping[Key, Messages],
    on_answer: Callable[[Key, str], None],
) -> dict[Key, str]:
    failures: dict[Key, str] = {}
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
    """The answer to one question, with retries.

    Raises:
        _Refused: retrying would not help.
        _Failed: the last attempt failed.
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
    try:
        return completion_text(data)
    except ValueError as error:
        raise _Refused(str(error)) from error


def _seconds(header: str | None) -> float | None:
    """`Retry-After` in seconds; None for a date, its other form."""
    return float(header) if header is not None and header.isdecimal() else None


def first_failures(failures: Mapping[Key, str], count: int = 3) -> Sequence[str]:
    """The most frequent messages among the failures."""
    messages = list(failures.values())
    return sorted(set(messages), key=lambda message: -messages.count(message))[:count]
