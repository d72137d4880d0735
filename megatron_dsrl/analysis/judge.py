"""`dsrl analyse behaviours`: recorded responses judged one by one by a model behind an OpenAI-compatible endpoint.

Every answer is saved immediately. The first line of the file holds the judge and a digest of the question. Run again,
the same command judges only responses without an answer. An unreadable answer counts as an answer, since temperature 0
would repeat it. Failed requests are retried as in `rewards/http_request.py`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from megatron_dsrl.analysis.behaviours import SYSTEM_PROMPT, USER_PROMPT, parse_answer, question
from megatron_dsrl.analysis.responses import RecordedResponse
from megatron_dsrl.common.background import in_background
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.records import Record, append_record, repair_records
from megatron_dsrl.rewards.http_request import Attempts, ask_chat_model

KEPT_CHARACTERS = 500
"""Length to which unreadable answers are saved."""

Key = tuple[int, int]
"""A response: its step, and its place among those of the step."""


@dataclass(frozen=True)
class JudgeEndpoint:
    """Address of the judge, and the client's limits. Raises UserError if the URL is not an HTTP address."""

    url: str
    """Up to and including `/v1`."""
    model: str
    api_key: str | None = None
    """Sent as a bearer token."""
    concurrency: int = 16
    """Questions in flight."""
    timeout_seconds: float = 300.0
    """Limit of one attempt."""
    retries: int = 5
    """Retries after the first attempt."""
    first_pause_seconds: float = 1.0
    """Pause before the second attempt; doubled before each later one."""
    max_tokens: int = 2048
    """Length limit of an answer."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--url: expected an address such as http://127.0.0.1:30000/v1, got {self.url!r}")


@dataclass(frozen=True)
class Judgements:
    """The result of `judge_responses`."""

    verdicts: list[Record]
    """`step`, `place` (of the response within the step), `problem`, `sample`, `right` and `behaviours` (None for an
    unreadable answer), including those of earlier starts."""
    failures: dict[Key, str]
    """Why the judge gave no answer, by step and place. These responses are judged again at the next start."""


def judge_responses(
    steps: Sequence[tuple[int, Sequence[tuple[int, RecordedResponse]]]],
    endpoint: JudgeEndpoint,
    file: Path,
    on_verdict: Callable[[], None] = lambda: None,
) -> Judgements:
    """Judge the responses that are not in the file yet. Raises UserError if the file was made with a different judge or
    question, or is damaged.

    Args:
        steps: steps with their chosen responses, each with its place within the step.
        file: file of the verdicts; folders are created.
        on_verdict: called once for every response with a verdict, including those of earlier starts.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    responses = {(step, place): response for step, chosen in steps for place, response in chosen}
    # not the URL: the same judge may move
    settings = {"model": endpoint.model, "question": _digest(SYSTEM_PROMPT + USER_PROMPT)}
    records = repair_records(file)
    done = _verdicts(records, settings, responses, file)
    with file.open("ab", buffering=0) as stream:

        def write(record: Record) -> None:
            append_record(stream, record, "No finished answer is lost")
            os.fsync(stream.fileno())

        def keep(key: Key, answer: str) -> None:
            done[key] = _verdict(key, responses[key], answer)
            write(done[key])
            on_verdict()

        if not records:
            write(settings)
        for _ in responses.keys() & done.keys():
            on_verdict()
        missing = {key: question(response) for key, response in responses.items() if key not in done}
        failures = ask_all(endpoint, missing, keep)
    return Judgements([done[key] for key in sorted(done)], failures)


def _verdict(key: Key, response: RecordedResponse, answer: str) -> Record:
    behaviours = parse_answer(answer)
    verdict: Record = {
        "step": key[0],
        "place": key[1],
        "problem": response.problem,
        "sample": response.number,
        "response": _digest(response.prompt + "\0" + response.text),
        "right": response.right,
        "behaviours": behaviours,
    }
    return verdict if behaviours is not None else verdict | {"answer": answer[:KEPT_CHARACTERS]}


def _verdicts(
    records: Sequence[Record],
    settings: dict[str, Any],
    responses: dict[Key, RecordedResponse],
    file: Path,
) -> dict[Key, Record]:
    """Verdicts of earlier starts by step and place."""
    if not records:
        return {}
    different = [key for key in settings if records[0].get(key) != settings[key]]
    if different:
        then, now = ({key: values.get(key) for key in different} for values in (records[0], settings))
        raise UserError(
            f"{file} was made with a different judge or question ({json.dumps(then)} then, {json.dumps(now)} now): "
            "choose another folder with --output, or delete the file"
        )
    try:
        done = {(record["step"], record["place"]): record for record in records[1:]}
        other = [
            key
            for key, response in responses.items()
            if key in done and done[key]["response"] != _digest(response.prompt + "\0" + response.text)
        ]
    except KeyError as error:
        what = f"a line is not a verdict (it has no {error})"
        raise UserError(f"{file}: {what}; delete the file to start over") from error
    if other:
        raise UserError(f"{file} judges other responses (step {other[0][0]}); choose another folder with --output")
    return done


def ask_all(
    endpoint: JudgeEndpoint, questions: Mapping[Key, list[dict[str, str]]], on_answer: Callable[[Key, str], None]
) -> dict[Key, str]:
    """Ask every question at temperature 0. Returns the last error of each question that got no answer.

    Args:
        on_answer: called with every answer as it arrives.
    """
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


def _ask(endpoint: JudgeEndpoint, messages: list[dict[str, str]]) -> str:
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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
