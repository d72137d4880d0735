"""The client of the judge against a small local HTTP server that answers from a script.

This tests the client: questions, limits, retries, files. No model judges here, so nothing is said about judging.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from megatron_dsrl.analysis.behaviours import BEHAVIOURS, behaviours_by_step, parse_answer, question, summary
from megatron_dsrl.analysis.judge import JudgeEndpoint, judge_responses
from megatron_dsrl.analysis.responses import RecordedResponse
from megatron_dsrl.common.errors import UserError
from tests.support.http_server import serving

NONE = dict.fromkeys(BEHAVIOURS, False)


class Endpoint(BaseHTTPRequestHandler):
    """Answers with the behaviours named in the solution; other words in it say how it misbehaves before."""

    requests: list[dict[str, Any]] = []
    tries: dict[str, int] = {}
    lock = threading.Lock()
    under_way = most_under_way = 0

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        solution = asked["messages"][1]["content"].split("<solution>\n")[1].split("\n</solution>")[0]
        with self.lock:
            number = self.tries[solution] = self.tries.get(solution, 0) + 1
            self.requests.append(asked | {"path": self.path, "key": self.headers.get("Authorization")})
            Endpoint.under_way += 1
            Endpoint.most_under_way = max(self.under_way, self.most_under_way)
        threading.Event().wait(0.02)
        with self.lock:
            Endpoint.under_way -= 1
        self._answer(solution, number)

    def _answer(self, solution: str, number: int) -> None:
        if "dropped" in solution and number == 1:
            self.close_connection = True
            return
        busy = ("busy" in solution and number <= 2) or "down" in solution
        self.send_response(503 if busy else 400 if "refused" in solution else 200)
        if busy:
            self.send_header("Retry-After", "0")
        self.end_headers()
        if "chatty" in solution:
            text = "I would rather tell a story."
        else:
            text = f"Here you are: {json.dumps({name: name in solution for name in BEHAVIOURS})}"
        self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[JudgeEndpoint]:
    Endpoint.requests, Endpoint.tries = [], {}
    Endpoint.under_way = Endpoint.most_under_way = 0
    with serving(Endpoint) as address:
        url = f"{address}/v1"
        yield JudgeEndpoint(url, "judge-1", api_key="secret", concurrency=3, retries=2, first_pause_seconds=0.01)


def steps_of(*texts: str, step: int = 1) -> list:
    responses = [RecordedResponse(step, 10 + i, 0, "1+1=?", text, 1.0, 5) for i, text in enumerate(texts)]
    return [(step, list(enumerate(responses)))]


def test_every_response_is_asked_about_as_the_endpoint_expects(endpoint, tmp_path) -> None:
    texts = ["verification only", *(f"backtracking and enumeration {i}" for i in range(8))]

    result = judge_responses(steps_of(*texts), endpoint, tmp_path / "new" / "behaviours.jsonl")

    assert not result.failures
    assert result.verdicts[0]["behaviours"] == NONE | {"verification": True}
    assert all(v["behaviours"] == NONE | {"backtracking": True, "enumeration": True} for v in result.verdicts[1:])
    first = next(request for request in Endpoint.requests if "verification only" in request["messages"][1]["content"])
    assert (first["path"], first["model"], first["temperature"]) == ("/v1/chat/completions", "judge-1", 0.0)
    assert first["key"] == "Bearer secret"
    assert "1+1=?" in first["messages"][1]["content"]
    assert Endpoint.most_under_way == endpoint.concurrency


def test_temporary_failures_are_retried_and_final_ones_are_not(endpoint, tmp_path) -> None:
    texts = ["busy", "dropped", "down", "refused"]

    result = judge_responses(steps_of(*texts), endpoint, tmp_path / "behaviours.jsonl")

    assert Endpoint.tries == {"busy": 3, "dropped": 2, "down": 3, "refused": 1}
    assert [verdict["place"] for verdict in result.verdicts] == [0, 1]
    assert "3 attempts; last failure: status 503" in result.failures[1, 2]
    assert "1 attempt; last failure: status 400" in result.failures[1, 3]


def test_an_endpoint_that_does_not_listen(tmp_path) -> None:
    endpoint = JudgeEndpoint("http://127.0.0.1:9/v1", "judge-1", retries=1, first_pause_seconds=0.01)

    result = judge_responses(steps_of("a"), endpoint, tmp_path / "behaviours.jsonl")

    assert result.verdicts == [] and "refused" in result.failures[1, 0]


def test_a_second_start_asks_only_what_has_no_answer(endpoint, tmp_path) -> None:
    file = tmp_path / "behaviours.jsonl"
    judge_responses(steps_of("busy", "chatty", "refused"), endpoint, file)
    with file.open("a") as stream:
        stream.write('{"step": 1, "pla')  # the start before died here
    asked, Endpoint.requests = len(Endpoint.requests), []

    result = judge_responses(steps_of("busy", "chatty", "refused", "verification"), endpoint, file)

    assert asked == 5  # three tries, one, and one
    assert len(Endpoint.requests) == 2  # the refused one again, and the new one
    assert [verdict["place"] for verdict in result.verdicts] == [0, 1, 3]
    assert len(file.read_text().splitlines()) == 1 + 3


def test_another_judge_or_other_responses_do_not_continue(endpoint, tmp_path) -> None:
    file = tmp_path / "behaviours.jsonl"
    judge_responses(steps_of("a"), endpoint, file)

    with pytest.raises(UserError, match=r"other responses \(step 1\)"):
        judge_responses(steps_of("b"), endpoint, file)
    with pytest.raises(UserError, match="made with a different judge or question.*judge-1.*judge-2"):
        judge_responses(steps_of("a"), JudgeEndpoint(endpoint.url, "judge-2"), file)
    with pytest.raises(UserError, match="--url: expected an address"):
        judge_responses(steps_of("a"), JudgeEndpoint("localhost:30000", "judge-1"), file)


def test_unreadable_answers_are_kept_and_counted(endpoint, tmp_path) -> None:
    result = judge_responses(steps_of("chatty", "verification", "plain"), endpoint, tmp_path / "behaviours.jsonl")

    assert result.verdicts[0]["answer"] == "I would rather tell a story."
    (record,) = behaviours_by_step(result.verdicts)
    assert record == {
        "step": 1,
        "responses": 3,
        "unreadable_answers": 1,
        **dict.fromkeys(BEHAVIOURS, 0.0),
        "verification": 0.5,  # of the two that could be read
    }
    assert summary([record])["unreadable_answers"] == 1


@pytest.mark.parametrize(
    ("answer", "behaviours"),
    [
        (json.dumps(NONE), NONE),
        (f"```json\n{json.dumps(NONE, indent=1)}\n```", NONE),
        (f"For example {json.dumps(NONE)}; here: {json.dumps(NONE | {'verification': True})}", {"verification": True}),
        (json.dumps(NONE | {"comment": "none at all"}), NONE),
        ("", None),
        ("{verification: true}", None),
        (json.dumps({"verification": True}), None),  # says nothing of the others
        (json.dumps(NONE | {"backtracking": "yes"}), None),
    ],
)
def test_reading_an_answer(answer, behaviours) -> None:
    assert parse_answer(answer) == (None if behaviours is None else NONE | behaviours)


def test_a_long_response_is_shown_without_its_middle() -> None:
    response = RecordedResponse(1, 0, 0, "1+1=?", "a" * 20_000 + "b" * 20_000, 0.0, 9)

    shown = question(response)[1]["content"]

    assert "[… 16,000 characters left out …]" in shown
    assert len(shown) < 25_000
