"""A reference policy behind a server: a real SGLang engine, and servers that fail."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from megatron_dsrl.algorithms.experience import Experience, Response, build_experience
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.actor import ReferenceConfig
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.address import API_KEY_VARIABLE
from megatron_dsrl.rollout.sample import SampleGroup
from megatron_dsrl.rollout.served_reference import ServedReference
from tests.support.engine import numbered_prompts

LAST_TOKEN = 127
"""The last token of the tiny model's vocabulary."""


def experience_of(groups: list[SampleGroup]) -> Experience:
    """All samples without the vocabulary's last token, which real models do not use and SGLang cannot score."""
    responses = [
        Response(group.prompt.token_ids, sample.response_ids, sample.log_probs, sample.reward, number)
        for number, group in enumerate(groups)
        for sample in group.samples
        if LAST_TOKEN not in sample.response_ids
    ]
    assert responses
    return build_experience(responses, PostTrain())


def test_log_probs_are_those_that_the_server_samples_with(
    engine_rollout: EngineRollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine_rollout.weight_version < 0:
        engine_rollout.restart_engines()
    (address,) = engine_rollout.engine_addresses
    assert address.key
    monkeypatch.setenv(API_KEY_VARIABLE, address.key)
    groups = engine_rollout.generate(numbered_prompts(3), 2, engine_rollout.training_sampling, "reference")
    experience = experience_of(groups)
    reference = ServedReference(ReferenceConfig(url=f"{address.url}/"))
    reference.try_out()
    scored = reference.log_probs(experience)
    for actual, sampled in zip(scored, experience.engine_log_probs, strict=True):
        torch.testing.assert_close(actual, sampled, rtol=1e-5, atol=1e-5)


class Failing(BaseHTTPRequestHandler):
    """Fails once, refuses, is down, or scores other tokens."""

    tries = 0
    behaviour = "fails once"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Failing.tries += 1
        assert self.path == "/generate"
        status = {"refuses": 400, "down": 503}.get(Failing.behaviour, 503 if Failing.tries == 1 else 200)
        shift = int(Failing.behaviour == "other tokens")
        entries = [[-0.5 * position, token + shift, None] for position, token in enumerate(request["input_ids"])]
        entries[0][0] = None
        meta = {} if Failing.behaviour == "scores nothing" else {"input_token_logprobs": entries}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"meta_info": meta}).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def failing() -> Iterator[str]:
    Failing.tries = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_failures(failing: str) -> None:
    experience = build_experience([Response([1, 2], [3, 4], [-1.0, -1.0], 1.0, 0)], PostTrain())

    def reference(behaviour: str, seconds: float = 30.0) -> ServedReference:
        Failing.behaviour = behaviour
        return ServedReference(ReferenceConfig(url=failing, timeout_seconds=seconds))

    assert reference("fails once").log_probs(experience)[0].tolist() == [-1.0, -1.5], "asked again"
    reference("fails once").try_out()
    with pytest.raises(UserError, match=r"refused a sequence with status 400"):
        reference("refuses").log_probs(experience)
    down = reference("down", seconds=0.5)
    for ask in (down.try_out, lambda: down.log_probs(experience)):
        with pytest.raises(UserError, match=r"did not score a sequence within reference.timeout_seconds = 0\.5.* 503"):
            ask()
    with pytest.raises(UserError, match="did not answer with a log-prob per token, but with {'meta_info': {}}"):
        reference("scores nothing").log_probs(experience)
    with pytest.raises(UserError, match="scored token 2 instead of token 1 at position 0"):
        reference("other tokens").log_probs(experience)
