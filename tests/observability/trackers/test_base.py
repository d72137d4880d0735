"""Trackers in the configuration, and the message when a package is missing."""

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.choices import TRACKERS
from megatron_dsrl.config.load import dump_config, load_config
from megatron_dsrl.observability.trackers import base
from megatron_dsrl.observability.trackers.mlflow import allowed_name, flat
from megatron_dsrl.observability.trackers.wandb import WandbTracker
from tests.support.recording_tracker import PATH, RecordingTracker
from tests.support.tiny_run import REPOSITORY

TINY = REPOSITORY / "configs" / "tiny_dsrl.yaml"


def test_names_options_and_dotted_paths(tmp_path) -> None:
    trackers = f"[{{name: wandb}}, {{name: mlflow, experiment: sums}}, {{name: '{PATH}', file: calls}}]"
    config = load_config(TINY, [f"observability.trackers={trackers}", "observability.trackers.0.mode=offline"])
    assert config.observability.trackers[0] == WandbTracker(mode="offline")
    assert config.observability.trackers[2] == RecordingTracker(name=PATH, file="calls")
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ("[wanbd]", r"observability\.trackers\.0: unknown name, got 'wanbd'; did you mean wandb\?"),
        ("[trackio, {name: wandb, projekt: a}]", r"trackers\.1\.projekt: unknown key; did you mean project\?"),
        ("[{name: wandb, mode: of}]", r"observability\.trackers\.0\.mode: expected 'online' or 'offline'"),
    ],
)
def test_mistakes_are_named_by_their_place(trackers, message) -> None:
    with pytest.raises(UserError, match=message):
        load_config(TINY, [f"observability.trackers={trackers}"])


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    chosen = [TRACKERS.build({"name": PATH, "file": "calls"}), TRACKERS.build("mlflow")]
    with pytest.raises(UserError, match=r"observability\.trackers: mlflow needs .* not .*: pip install mlflow-skinny"):
        base.check_packages(chosen)


def test_destinations_are_where_the_records_go(monkeypatch) -> None:
    """Not how they get there, nor whether a default is written out."""
    for variable in ("WANDB_PROJECT", "WANDB_MODE", "WANDB_ENTITY", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    same = [WandbTracker(), WandbTracker(project="megatron-dsrl", mode="online", tags=["a"], finish_seconds=1.0)]
    assert same[0].destination() == same[1].destination() != WandbTracker(mode="offline").destination()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert WandbTracker().destination() == WandbTracker(project="mine").destination()


def test_mlflow_gets_names_and_parameters_in_its_own_form() -> None:
    assert allowed_name("evaluation/held-out/pass@8") == "evaluation/held-out/pass_at_8"
    config = {"data": {"columns": ["a", "b"], "system_prompt": None}, "phases": [{"name": "grpo"}], "empty": {}}
    assert dict(flat(config)) == {
        "data.columns": '["a", "b"]', "data.system_prompt": "null", "phases.0.name": "grpo", "empty": "{}",
    }  # fmt: skip
