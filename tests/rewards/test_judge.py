"""The judge reward against a real HTTP server with OpenAI's interface."""

import json
import re
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.rewards.judge import judge
from megatron_dsrl.rewards.pool import Judgement, RewardPool
from tests.support.http_server import serving

PROMPT = "<|im_start|>user\nWhat is 2+{answer}?<|im_end|>\n<|im_start|>assistant\n"


class Endpoint(BaseHTTPRequestHandler):
    """Says `Verdict: right` if the response has the reference answer; the model's name says how it misbehaves."""

    asked: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({**request, "path": self.path, "key": self.headers.get("Authorization")})
        model, question = request["model"], request["messages"][0]["content"]
        if model == "hangs":
            time.sleep(1.0)
        answer, response = re.search(r"Reference answer: (.*)\n\nResponse:\n(.*)", question).groups()
        right = "right" if answer in response else "wrong"
        texts = {"silent": "I cannot tell.", "scores": "Verdict: 1.\nNo, I mean Verdict: 7.5"}
        text = texts.get(model, f"The verdict: wrong? Let me check.\n**Verdict: {right}**")
        self.send_response(503 if model == "busy" and len(self.asked) == 1 else 400 if model == "refuses" else 200)
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(Endpoint) as address:
        yield f"{address}/v1"


@pytest.fixture(autouse=True)
def forget() -> None:
    Endpoint.asked.clear()


def test_the_last_verdict_counts_and_numbers_are_scaled(url: str) -> None:
    assert judge("It is 6", "6", url, "any") == 1.0
    assert judge("It is 5", "6", url, "any") == 0.0
    assert judge("It is 5", "6", url, "scores", max_score=10) == 0.75
    assert judge("It is 5", "6", url, "scores") == 1.0, "clipped"


def test_the_judge_sees_problem_answer_and_the_end_of_the_response(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge("no {answer}", "6", url, "any", prompt=PROMPT, max_response_characters=8, api_key_variable="JUDGE_KEY")
    (request,) = Endpoint.asked
    assert (request["path"], request["key"]) == ("/v1/chat/completions", "Bearer secret")
    assert (request["temperature"], request["max_tokens"]) == (0.0, 1024)
    question = request["messages"][0]["content"]
    assert "user\nWhat is 2+{answer}?\n" in question, "braces of a problem are not placeholders"
    assert "<|" not in question, "special tokens would begin a turn of the judge's chat"
    assert "Response:\n{answer}\n" in question


def test_retries_and_failures(url: str) -> None:
    assert judge("6", "6", url, "busy") == 1.0
    assert len(Endpoint.asked) == 2
    with pytest.raises(RuntimeError, match=r"no verdict: its answer ends in 'I cannot tell\.'"):
        judge("6", "6", url, "silent")
    with pytest.raises(RuntimeError, match=r"after 1 attempt; last failure: status 400"):
        judge("6", "6", url, "refuses")
    with pytest.raises(RuntimeError, match=r"after 1 attempt; last failure: Timeout"):
        judge("6", "6", url, "hangs", total_seconds=0.3)


def test_equal_questions_are_asked_once(url: str, tmp_path: Path) -> None:
    for _ in range(2):
        assert judge("It is 6", "6", url, "any", cache=str(tmp_path)) == 1.0
    assert len(Endpoint.asked) == 1
    judge("It is 6", "6", url, "any", cache=str(tmp_path), max_score=2.0)
    assert len(Endpoint.asked) == 2
    (damaged, *_) = tmp_path.glob("*/*.json")
    damaged.write_text("{")
    assert {judge("It is 6", "6", url, "any", cache=str(tmp_path), max_score=score) for score in (1.0, 2.0)} == {1.0}
    with pytest.raises(RuntimeError):
        judge("6", "6", url, "silent", cache=str(tmp_path))
    assert judge("6", "6", url, "silent", cache=str(tmp_path), fallback="boxed") == 0.0
    assert len(list(tmp_path.glob("*/*.json"))) == 2, "a verdict of the fallback is not the judge's"


def test_in_the_pool_and_in_a_combination(url: str) -> None:
    judged = {"url": url, "total_seconds": 5.0, "model": "any"}
    fallback = {**judged, "model": "silent", "fallback": "boxed"}
    parts = [{"function": "judge", "options": judged}, {"function": "judge", "options": fallback, "weight": 0.5}]
    config = RewardConfig(function="combination", options={"parts": parts}, timeout_seconds=20, workers=1)
    with RewardPool(config) as pool:
        responses = [r"It is \boxed{6}", "It is 6", r"\boxed{5}"]
        rewards = [pool.submit(response, "6", prompt=PROMPT).result(timeout=30) for response in responses]
    assert rewards == [Judgement(1.5, "fallback"), Judgement(1.0, "fallback"), Judgement(0.0, "fallback")]
    assert all("What is 2+" in request["messages"][0]["content"] for request in Endpoint.asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "judge:1"}, "reward.options.url: expected http://host:port/path"),
        ({"question": "Is it {answer}?"}, "the placeholder {response} is missing"),
        ({"verdict_pattern": "("}, "verdict_pattern is not a regular expression"),
        ({"verdict_pattern": "yes"}, "verdict_pattern has no group"),
        ({"api_key_variable": "DSRL_NO_SUCH_VARIABLE"}, "variable DSRL_NO_SUCH_VARIABLE is not set"),
        ({"fallback": "boxd"}, "reward.options.fallback: unknown verifier 'boxd'"),
        ({"fallback": "boxed", "fallback_options": {"x": 1}}, "fallback_options: boxed does not take"),
        ({"total_seconds": 10.0}, "reward.timeout_seconds = 10 would end judge before its own limit of 10 s"),
    ],
)
def test_options_are_checked_before_anything_starts(options: dict[str, Any], message: str) -> None:
    options = {"url": "http://127.0.0.1:9/v1", "model": "any", "total_seconds": 5.0, **options}
    with pytest.raises(UserError, match=re.escape(message)):
        RewardPool(RewardConfig(function="judge", options=options))
