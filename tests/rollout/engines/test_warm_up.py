"""Requests that have a new engine compile its kernels."""

import asyncio

import pytest

from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.errors import EngineError, EngineStartError
from megatron_dsrl.rollout.engines.server import EngineServer
from megatron_dsrl.rollout.engines.warm_up import kinds_of_requests, warm_up
from tests.support.engine import processes_of_group, start_servers_as


def test_an_engine_samples_in_every_way_and_one_that_is_gone_is_an_error(engine_rollout) -> None:
    (address,) = engine_rollout.engine_addresses
    asyncio.run(warm_up(address, return_routed_experts=False, timeout_seconds=60.0))
    with pytest.raises(EngineError, match="is gone"):
        asyncio.run(warm_up(EngineAddress("http://127.0.0.1:9"), return_routed_experts=False, timeout_seconds=60.0))


def test_the_kinds_differ_in_what_the_sampler_computes() -> None:
    plain, greedy, filtered = kinds_of_requests(return_routed_experts=True)
    assert plain.temperature == 1 and greedy.temperature == 0 and filtered.top_p < 1 < filtered.top_k
    assert all(kind.return_routed_experts for kind in (plain, greedy, filtered))


ANSWERS_AT_ONCE = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
order = json.loads(sys.stdin.readline())["arguments"]
http.server.HTTPServer((order["host"], order["port"]), Handler).serve_forever()
"""
"""A server that is up at once; the other test of this file warms up a real one."""


def test_a_new_engine_is_ready_once_it_is_warm(tmp_path, monkeypatch) -> None:
    """One that does not warm up in time is stopped; it may be started again."""
    start_servers_as(ANSWERS_AT_ONCE, monkeypatch)
    seconds_left = []

    def take_too_long(seconds: float) -> None:
        seconds_left.append(seconds)
        raise EngineError("too slow")

    server = EngineServer({}, {}, tmp_path / "engine_0.log", startup_timeout_seconds=120.0, warm_up=take_too_long)
    server.start()
    group = server.process_id
    with pytest.raises(EngineStartError, match="too slow"):
        server.wait_until_ready()
    assert 0 < seconds_left[0] < 120 and processes_of_group(group) == []
