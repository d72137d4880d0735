"""`dsrl analyse behaviours`: recorded responses judged one by one, with every answer saved immediately.

The first line of the file has the judge and a digest of the question. The same command continues: only responses
without an answer are judged again. An unreadable answer counts as an answer, since temperature 0 would repeat it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dsrl.analysis.behaviours import SYSTEM_PROMPT, USER_PROMPT, parse_answer, question
from megatron_dsrl.analysis.judge import JudgeEndpoint, ask_all
from megatron_dsrl.analysis.responses import RecordedResponse
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.records import Record, record_line, repair_records

KEPT_CHARACTERS = 500
"""Length to which unreadable answers are saved."""
_KEY = ("step", "place")


@dataclass(frozen=True)
class Judgements:
    """The result of `judge_responses`."""

    verdicts: list[Record]
    """`step`, `place` (of the response within the step), `problem`, `sample`, `right` and `behaviours` (None for an
    unreadable answer), including those of earlier starts."""
    failures: dict[tuple[int, int], str]
    """Why the judge gave no answer, by step and place. These responses are judged again at the next start."""


def judge_responses(
    steps: Sequence[tuple[int, Sequence[tuple[int, RecordedResponse]]]],
    endpoint: JudgeEndpoint,
    file: Path,
    on_verdict: Callable[[], None] = lambda: None,
) -> Judgements:
    """Judge the responses that are not in the file yet.

    Args:
        steps: steps with their chosen responses, each with its place within the step.
        file: file of the verdicts; folders are created.
        on_verdict: called once for every response with a verdict, including those of earlier starts.

    Raises:
        UserError: the file was made with another judge or question, or is damaged.
    """
    endpoint.check()
    file.parent.mkdir(parents=True, exist_ok=True)
    responses = {(step, place): response for step, chosen in steps for place, response in chosen}
    settings = {"model": endpoint.model, "question": _digest()}  # not the URL: the same judge may move
    records = repair_records(file)
    done = _verdicts(records, settings, responses, file)
    with file.open("a", encoding="utf-8") as stream:

        def write(record: Record) -> None:
            stream.write(record_line(record))
            stream.flush()
            os.fsync(stream.fileno())

        def keep(key: tuple[int, int], answer: str) -> None:
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


def _verdict(key: tuple[int, int], response: RecordedResponse, answer: str) -> Record:
    behaviours = parse_answer(answer)
    verdict: Record = dict(zip(_KEY, key)) | {
        "problem": response.problem,
        "sample": response.number,
        "response": _response_digest(response),
        "right": response.right,
        "behaviours": behaviours,
    }
    return verdict if behaviours is not None else verdict | {"answer": answer[:KEPT_CHARACTERS]}


def _verdicts(
    records: Sequence[Record],
    settings: dict[str, Any],
    responses: dict[tuple[int, int], RecordedResponse],
    file: Path,
) -> dict[tuple[int, int], Record]:
    """Verdicts of earlier starts by step and place."""
    if not records:
        return {}
    different = [key for key in settings if records[0].get(key) != settings[key]]
    if different:
        then, now = ({key: values.get(key) for key in different} for values in (records[0], settings))
        raise UserError(
            f"{file} was made with another judge or question ({json.dumps(then)} then, {json.dumps(now)} now): choose "
            "another folder with --output, or delete the file"
        )
    try:
        done = {(record["step"], record["place"]): record for record in records[1:]}
        other = [key for key in done if key in responses and done[key]["response"] != _response_digest(responses[key])]
    except KeyError as error:
        what = f"a line is not a verdict (it has no {error})"
        raise UserError(f"{file}: {what}; delete the file to start over") from error
    if other:
        raise UserError(f"{file} judges other responses (step {other[0][0]}); choose another folder with --output")
    return done


def _digest() -> str:
    return hashlib.sha256((SYSTEM_PROMPT + USER_PROMPT).encode()).hexdigest()[:16]


def _response_digest(response: RecordedResponse) -> str:
    return hashlib.sha256((response.prompt + "\0" + response.text).encode()).hexdigest()[:16]
