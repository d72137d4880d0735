"""A custom phase class: loaded, written out, explained, and asked at every step."""

import re
from pathlib import Path

import pytest

from megatron_dsrl.checkpoint.compatibility import check_same_run
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import dump_config, load_config
from megatron_dsrl.config.summary import derive

OWN_MODULE = """
from pydantic import Field
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.config.phase import ObjectiveConfig, PhaseConfig

class Turns(PhaseConfig):
    also: ObjectiveConfig | None = None
    every: int = Field(default=2, ge=1)
    span: tuple[float, float] = (0.0, 1.0)

    @property
    def objectives(self):
        return super().objectives | ({"also": self.also} if self.also else {})

    def at(self, step):
        if step % self.every == 0:
            return self.model_copy(update={"space": PostTrain()})
        if step == 5:
            return {}["no such key"] if self.name == "fails" else None
        return self

class Another:
    pass
"""


@pytest.fixture
def own(small, write, tmp_path, monkeypatch) -> Path:
    """Configuration file whose warm-up is a custom class."""
    (tmp_path / "own_phases.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    small["phases"][0] |= {"type": "own_phases:Turns", "every": 2, "span": [0.5, 1]}
    return write("run.yaml", small)


def test_its_fields_are_read_and_written_like_any_other(own, tmp_path) -> None:
    config = load_config(own)
    warm_up, grpo = config.phases
    assert type(warm_up).__name__ == "Turns" and warm_up.span == (0.5, 1.0)
    assert type(grpo).__name__ == "PhaseConfig"
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    check_same_run(config.model_dump(mode="json"), config, "here")
    with pytest.raises(UserError, match=r"phases\.0\.every: 2 there, 3 now"):
        check_same_run(config.model_dump(mode="json"), load_config(own, ["phases.0.every=3"]), "here")


def test_every_step_counts_in_the_figures(own) -> None:
    """The second of the two steps is in the post-train space, which includes the prompts: 160 tokens, not 63."""
    assert derive(load_config(own), 1, None).phases[0].max_tokens_per_step == 32 * 160
    assert derive(load_config(own, ["phases.0.every=3"]), 1, None).phases[0].max_tokens_per_step == 32 * 63
    also = "phases.0.also={space: {name: post_train}, advantage: group_mean}"
    assert derive(load_config(own, [also, "phases.0.every=3"]), 1, None).phases[0].max_tokens_per_step == 32 * 223


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.0.evry=3", "phases.0.evry: unknown key; did you mean every?"),
        ("phases.0.every=0", "phases.0.every: expected greater than or equal to 1, got 0"),
        (
            "phases.0.also={space: {name: post_train}, advantage: {name: fixed, lef: 0}}",
            "phases.0.also.advantage.lef: unknown key",
        ),
        ("phases.0.type=no.such:Phase", "phases.0.type: cannot import `no.such`"),
        (
            "phases.0.type=own_phases:Another",
            "phases.0.type: `own_phases` has no phase `Another`, which must be a subclass of PhaseConfig, got",
        ),
        ("phases.0.type=3", "phases.0.type: expected a string, got 3"),
        ("phases.0.type=null", "phases.0.every: unknown key"),
    ],
)
def test_mistakes_name_the_place_and_what_was_meant(own, override, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(own, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.0.name=fails", "phases.0: own_phases:Turns fails at step 5: KeyError: 'no such key'"),
        ("phases.0.name=none", "phases.0: own_phases:Turns.at(5) returned None, expected a PhaseConfig"),
        ("rollout.samples_per_prompt=1", "phases.0, rollout.samples_per_prompt: the advantage `group_mean` compares"),
    ],
)
def test_what_it_does_at_some_step_is_known_before_the_start(own, override, message) -> None:
    until = "phases.0.until_step=" + ("2" if "samples" in override else "5")
    with pytest.raises(UserError, match=re.escape(message)):
        derive(load_config(own, [until, override]), 1, None)
