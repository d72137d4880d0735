"""Sections other than a run's get the same messages: the place, the nearest name, and where the key belongs."""

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.benchmark import BenchmarkRunConfig
from megatron_dsrl.config.model import GradientAnalysisConfig
from megatron_dsrl.config.run import SweepConfig
from megatron_dsrl.config.validate import validated


@pytest.mark.parametrize(
    ("section", "data", "path", "message"),
    [
        (
            SweepConfig,
            {"output_dir": "runs", "seeds": [1], "baseline": "A", "runs": {"A": {"confg": "a.yaml", "config": "a"}}},
            ("runs", "A", "confg"),
            "runs.A.confg: unknown key; did you mean config? (line 7)",
        ),
        (
            BenchmarkRunConfig,
            {"model": {"path": "m"}, "engine": {"tensor_paralel_size": 2}},
            ("engine", "tensor_paralel_size"),
            "engine.tensor_paralel_size: unknown key; did you mean tensor_parallel_size? (line 7)",
        ),
        (
            GradientAnalysisConfig,
            {"model": {"path": "m"}, "tensor_parallel_size": 2},
            ("tensor_parallel_size",),
            "tensor_parallel_size: unknown key; did you mean parallel.tensor_parallel_size? (line 7)",
        ),
        (
            GradientAnalysisConfig,
            {"model": {"path": "m"}, "bos": "im_strat"},
            ("bos",),
            "bos: expected 'im_start', 'none' or 'assistant', got 'im_strat'; did you mean im_start? (line 7)",
        ),
    ],
)
def test_every_section_says_what_was_meant(section, data, path, message) -> None:
    with pytest.raises(UserError) as refused:
        validated(section, data, {path: "line 7"}, "here.yaml", "settings")
    assert str(refused.value) == f"here.yaml: 1 problem in the settings\n  {message}"


def test_what_is_right_becomes_the_section() -> None:
    settings = validated(GradientAnalysisConfig, {"model": {"path": "m"}, "temperature": 2}, {}, "here.yaml")
    assert (settings.model.path, settings.temperature) == ("m", 2.0)
