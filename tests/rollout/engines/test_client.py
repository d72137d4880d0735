"""Calls to a server that is not what it should be."""

import asyncio
from http.server import BaseHTTPRequestHandler

import pytest

from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import EngineError
from tests.support.http_server import serving


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("{", "the answer to /weights_checker cannot be read"),
        ('{"success": true}', "/weights_checker has no digests: {'success': True}"),
        ('{"success": true, "ranks": [{"checksums": {}}]}', "/weights_checker has no digests"),
    ],
)
def test_an_answer_of_another_form_is_an_error_of_the_engine(answer, message) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(answer.encode())

    async def ask(url: str) -> None:
        async with EngineClient(EngineAddress(url), timeout_seconds=5.0) as client:
            await client.weight_digests()

    with serving(Answers) as url, pytest.raises(EngineError, match=message):
        asyncio.run(ask(url))
