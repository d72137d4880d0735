"""Client of a judge model behind an OpenAI-compatible endpoint, such as SGLang's, with limited concurrency.

Failed requests are retried as in `rewards/http_request.py`.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar
from urllib.parse import urlsplit

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import in_background
from megatron_dsrl.rewards.http_request import Attempts, ask_chat_model

Messages = list[dict[str, str]]
Key = TypeVar("Key", bound=Hashable)


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
    waiting = iter(questions.items())
    outcomes: SimpleQueue[tuple[Key, str | Exception]] = SimpleQueue()

    def work() -> None:
        for key, messages in waiting:  # shared by all threads: each takes the next question
            try:
                outcomes.put((key, _ask(endpoint, messages)))
            except Exception as error:
                outcomes.put((key, error))

    for _ in range(min(endpoint.concurrency, len(questions))):
        in_background(work)
    failures: dict[Key, str] = {}
    for _ in questions:
        key, outcome = outcomes.get()
        if isinstance(outcome, str):
            on_answer(key, outcome)
        elif isinstance(outcome, RuntimeError | ValueError):
            failures[key] = str(outcome)
        else:
            raise outcome
    return failures


def _ask(endpoint: JudgeEndpoint, messages: Messages) -> str:
    request = {
        "model": endpoint.model,
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": endpoint.max_tokens,
    }
    attempts = Attempts(
        endpoint.timeout_seconds,
        endpoint.retries,
        headers={"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {},
        first_pause_seconds=endpoint.first_pause_seconds,
    )
    return ask_chat_model(endpoint.url, request, attempts)


def first_failures(failures: Mapping[Key, str]) -> Sequence[str]:
    """The three most frequent messages among the failures."""
    messages = list(failures.values())
    return sorted(set(messages), key=lambda message: -messages.count(message))[:3]
