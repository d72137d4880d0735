"""The remote reward against a real HTTP server that fails in all the usual ways."""

import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import RewardConfig
from megatron_dsrl.rewards.pool import Judgement, RewardPool
from megatron_dsrl.rewards.remote import remote
from tests.support.http_server import serving


class Judge(BaseHTTPRequestHandler):
    """Rewards the length of the response; the path says how it misbehaves before."""

    tries: dict[str, int] = {}

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = self.tries[self.path] = self.tries.get(self.path, 0) + 1
        if self.path == "/hangs":
            time.sleep(1.0)
        status = {"/refuses": 403, "/down": 503}.get(self.path, 503 if self.path == "/busy" and number == 1 else 200)
        answers = {"/text": b"good", "/nan": b'{"reward": NaN}', "/other": b'{"score": 0.25}'}
        body = answers.get(self.path, json.dumps({"reward": len(asked["response"]) + len(asked["answer"])}).encode())
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(Judge) as address:
        yield address


def test_reward_and_retry(address) -> None:
    assert remote("abc", "de", f"{address}/") == 5.0
    assert remote("abc", "de", f"{address}/busy") == 5.0
    assert Judge.tries["/busy"] == 2
    assert remote("abc", "de", f"{address}/other", field="score") == 0.25


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/down", "after 2 attempts; last failure: status 503"),
        ("/refuses", "after 1 attempt; last failure: status 403"),
        ("/hangs", "after 2 attempts; last failure: Timeout"),
        ("/text", "answered without a number in `reward`"),
    ],
)
def test_failures(address, path, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        remote("abc", "de", f"{address}{path}", try_timeout_seconds=0.3, retries=1)


def test_a_dead_server_and_a_reward_that_is_not_a_number_are_counted(address) -> None:
    for path in ("http://127.0.0.1:9/", f"{address}/nan"):
        config = RewardConfig(function="remote", options={"url": path, "retries": 0}, workers=1)
        with RewardPool(config) as pool:
            assert pool.submit("abc", "de").result(timeout=30) == Judgement(0.0, "error")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "missing a required argument: 'url'"),
        ({"url": "ftp://x"}, "expected http://host:port/path, got 'ftp://x'"),
        ({"url": "http://x", "retries": "2"}, "reward.options.retries: remote needs a int, got '2'"),
        ({"url": "http://x", "timeout": 2}, "got an unexpected keyword argument 'timeout'"),
    ],
)
def test_options_are_checked_before_anything_starts(options, message) -> None:
    with pytest.raises(UserError, match=message):
        RewardPool(RewardConfig(function="remote", options=options))
