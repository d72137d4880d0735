"""What `dsrl config` says about a key."""

import re

import pytest

from megatron_dsrl.cli import main
from megatron_dsrl.commands.setup import KIND_NAMES
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.describe import default_of, find, limits_of, meaning_of, type_of
from megatron_dsrl.config.kinds import KINDS
from megatron_dsrl.config.run import RunConfig, SweepConfig


@pytest.mark.parametrize(
    ("key", "kind", "default", "limits"),
    [
        ("rollout.top_p", "number", "1.0", "above 0 and at most 1"),
        ("steps", "integer", None, "at least 1 and at most 1000000"),
        ("rollout.prompts_per_step", "integer", "128", "at least 1"),
        ("rollout.replay_from", "string, or null", "null", ""),
        ("optimizer.betas", "list of 2 numbers", "[0.9, 0.999]", ""),
        ("optimizer.decay", "one of constant, linear, cosine", "constant", ""),
        ("critic.value_clip", "number, or null", "0.2", "above 0"),
        ("data.subset", "string or list of strings, or null", "null", ""),
        ("phases", "list of sections", None, "not empty"),
        ("phases.0.filter", "a filter, or the dotted path of your own", "all", ""),
        ("phases.loss.gspo.clip_low", "number", "0.0003", "at least 0 and below 1"),
        ("evaluation.sets.0.temperature", "number", "0.0", "at least 0"),
        ("model", "section", None, ""),
        ("reward.function", "name of a verifier, or the dotted path of your own", "boxed", ""),
    ],
)
def test_type_default_and_limits(key, kind, default, limits) -> None:
    [place] = find(RunConfig, key)
    assert (type_of(place.field), default_of(place.field), limits_of(place.field)) == (kind, default, limits)
    assert meaning_of(place)


def test_an_option_is_found_in_every_choice_that_has_it() -> None:
    found = find(RunConfig, "phases.loss.clip_high")
    assert [place.path for place in found] == [
        "phases.loss.dual_clip.clip_high",
        "phases.loss.gspo.clip_high",
        "phases.loss.cispo.clip_high",
    ]
    [place] = find(RunConfig, "phases.0.loss.gspo.clip_high")
    assert default_of(place.field) == "0.0004"


def test_a_key_of_a_mapping_is_any_name() -> None:
    [place] = find(SweepConfig, "runs.GRPO.overrides")
    assert type_of(place.field) == "list of strings"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rollout.temprature", "rollout.temprature: unknown key `temprature`; did you mean temperature?"),
        ("top_p", "did you mean rollout.top_p or evaluation.sets.top_p?"),
        ("tempratur", "did you mean rollout.temperature?"),
        ("phases.loss.gpso", "did you mean gspo?"),
        ("steps.x", "unknown key `x`; it is a single value"),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(key, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        find(RunConfig, key)


def test_the_command_fits_80_columns(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for key in ("", "rollout", "phases", "phases.loss", "reward.function", "rollout.partial_rollouts"):
        assert main(["config", *filter(None, [key])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line != line.rstrip()] == []
    assert "  top_p: number, default 1.0, above 0 and at most 1" in lines
    assert "        clip_low: number, default 0.0003, at least 0 and below 1" in lines
    assert any(line.startswith("      1.0 when the program passes its tests") for line in lines)


def test_every_kind_can_be_asked_for(capsys) -> None:
    assert tuple(KINDS) == KIND_NAMES
    for kind in KIND_NAMES:
        assert main(["config", "--kind", kind]) == 0
        assert KINDS[kind].where in capsys.readouterr().out
