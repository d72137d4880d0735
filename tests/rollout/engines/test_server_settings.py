"""A server's settings are recorded beside its log, without keys."""

import json

import pytest

from megatron_dsrl.rollout.engines.server_settings import read_settings, settings_file, write_settings


def test_only_settings_are_recorded_not_keys(tmp_path) -> None:
    log = tmp_path / "engine_0.log"
    assert read_settings(log) == {}
    write_settings(json.dumps({"dtype": "bfloat16", "api_key": "secret", "model_path": "m"}).encode(), log)
    assert read_settings(log) == {"dtype": "bfloat16"}
    assert settings_file(log) == tmp_path / "engine_0.json"


def test_an_answer_that_is_not_an_object_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="/server_info answered"):
        write_settings(b'["dtype"]', tmp_path / "engine_0.log")


def test_a_server_that_is_ready_has_recorded_its_settings(engine_rollout) -> None:
    log = engine_rollout._engines._server.log_file
    settings = read_settings(log)
    assert settings["attention_backend"] == "torch_native" and settings["max_total_num_tokens"] > 0
    assert engine_rollout.engine_addresses[0].key not in settings_file(log).read_text()
