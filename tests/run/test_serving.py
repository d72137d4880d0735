"""`dsrl serve`. examples/asynchronous/run.sh starts a server with it, which the test of every command runs."""

from pathlib import Path

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rollout.engines.address import API_KEY_VARIABLE
from megatron_dsrl.run.serving import serve
from tests.support.engine import tiny_run_config


def test_other_machines_need_a_key(monkeypatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    with pytest.raises(UserError, match=f"--host 0.0.0.0: .* set {API_KEY_VARIABLE}"):
        serve(tiny_run_config(Path("model")), "0.0.0.0", 30000)
