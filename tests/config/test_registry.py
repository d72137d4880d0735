"""Choices by name: built-in ones, custom ones by dotted path, and the messages for mistakes."""

import re

import pytest

from megatron_dsrl.algorithms.advantages import GroupStandardised
from megatron_dsrl.algorithms.filters import Negative
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.choices import ADVANTAGES, AGGREGATIONS, FILTERS, IMPORTANCE_CORRECTIONS, LOSSES
from megatron_dsrl.config.load import dump_config, load_config

OWN_MODULE = """
from megatron_dsrl.algorithms.advantages import AdvantageEstimate, AdvantageOptions

class Halved(AdvantageOptions):
    pair: tuple[float, float] = (0.5, 0.5)

    def estimate(self, experience):
        return AdvantageEstimate.from_samples(experience.sample_rewards * self.pair[0], experience)
"""


def test_built_in_names() -> None:
    assert {"group_mean", "group_standardised", "leave_one_out", "fixed", "reinforce_pp"} <= set(ADVANTAGES.names())
    assert FILTERS.names() == ["all", "negative", "positive"]
    assert {"dual_clip", "policy_gradient", "gspo", "cispo", "supervised"} <= set(LOSSES.names())
    assert AGGREGATIONS.names() == ["token_mean", "sequence_mean", "token_sum"]
    assert IMPORTANCE_CORRECTIONS.names() == ["truncated", "masked"]


def test_a_bare_name_is_short_for_a_section_and_options_are_kept(small, write, tmp_path) -> None:
    config = load_config(
        write("run.yaml", small),
        ["phases.1.advantage={name: group_standardised, eps: 1e-3}", "phases.1.filter=negative"],
    )
    assert config.phases[1].advantage == GroupStandardised(eps=1e-3)
    assert config.phases[1].filter == Negative()
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert "eps: 0.001" in (tmp_path / "resolved.yaml").read_text()


def test_a_custom_class_by_dotted_path(small, write, tmp_path, monkeypatch) -> None:
    (tmp_path / "own_advantage.py").write_text(OWN_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    own = "phases.1.advantage={name: 'own_advantage:Halved', pair: [0.25, 1.0]}"
    config = load_config(write("run.yaml", small), [own])
    assert type(config.phases[1].advantage).__name__ == "Halved"
    assert config.phases[1].advantage.pair == (0.25, 1.0)
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    with pytest.raises(UserError, match=r"phases\.1\.advantage\.pairs: unknown key; did you mean pair\?"):
        load_config(write("run.yaml", small), ["phases.1.advantage={name: 'own_advantage:Halved', pairs: [1, 1]}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "phases.1.advantage.name=group_men",
            "phases.1.advantage.name: unknown name, got 'group_men'; did you mean group_mean?; valid names are ",
        ),
        ("phases.1.advantage=nothing_like_it", "phases.1.advantage: unknown name, got 'nothing_like_it'; valid "),
        ("phases.1.advantage.epsilon=1", "phases.1.advantage.epsilon: unknown key; did you mean eps?"),
        ("phases.1.loss={name: dual_clip, clip_low: -1}", "phases.1.loss.clip_low: expected greater than or equal "),
        ("phases.1.loss={clip_low: 0.1}", "phases.1.loss: needs a `name` that says which kind it is"),
        ("phases.1.importance_correction={name: masked, lo: 0}", "phases.1.importance_correction.lo: unknown key; did"),
        ("phases.1.loss={name: 'no.such:Loss'}", "phases.1.loss.name: cannot import `no.such`"),
        ("phases.1.loss={name: ':Loss'}", "phases.1.loss.name: cannot import ``"),
        (
            "phases.1.loss={name: 'megatron_dsrl.algorithms.advantages:GroupMean'}",
            "phases.1.loss.name: `megatron_dsrl.algorithms.advantages` has no loss `GroupMean`, which must be a",
        ),
        (
            "phases.1.additional_objectives=[{name: a, space: {name: pre_train}, advantage: {name: fixed, lef: 0}}]",
            "phases.1.additional_objectives.0.advantage.lef: unknown key; valid names are",
        ),
        (
            "phases.1.additional_objectives=[{name: policy, space: {name: pre_train}, advantage: fixed}]",
            "phases.1: the names of additional_objectives must differ from each other and `policy`",
        ),
        ("phases.0.importance_correction=truncated", "phases.0: importance_correction compares trainer and engine"),
        ("phases.1.kl={}", "phases.1.kl: set loss_coefficient or reward_coefficient above 0, or the section to null"),
    ],
)
def test_mistakes_name_the_place_and_what_was_meant(small, write, override, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(write("run.yaml", small), [override])
