"""Engines with different numerics or older weights than the trainer: which settings are allowed, and corrections."""

from pathlib import Path

import pytest

from megatron_dsrl.algorithms.importance import Masked, Truncated
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.benchmark import BenchmarkRunConfig
from megatron_dsrl.config.engine_numerics import numerics_problems
from megatron_dsrl.config.layout import ModelShape
from megatron_dsrl.config.load import dump_config, load_config
from megatron_dsrl.config.validate import validated

CONFIGS = Path(__file__).parents[2] / "configs"
FP8 = CONFIGS / "dsrl_qwen3_8b_fp8.yaml"
PLAIN = CONFIGS / "dsrl_qwen3_8b.yaml"
QWEN3_8B = ModelShape(36, 32, 8, 12288, 40960, key_value_size=1024)


@pytest.mark.parametrize(
    ("file", "overrides", "corrected"),
    [
        (FP8, [], True),
        (PLAIN, [], False),
        (PLAIN, ["engine.extra_arguments={speculative_algorithm: NGRAM}"], True),
        (PLAIN, ["engine.extra_arguments={quantization: fp8}"], True),
        (PLAIN, ["engine.extra_arguments={attention_backend: fa3}"], False),
        (PLAIN, ["rollout.max_staleness=1"], False),
        (PLAIN, ["rollout.max_staleness=1", "phases.1.loss=gspo"], False),
        (PLAIN, ["rollout.max_staleness=1", "phases.1.loss={name: policy_gradient}"], True),
        (PLAIN, ["phases.1.loss=policy_gradient"], False),
    ],
)
def test_objectives_in_post_train_space_are_corrected_by_default(
    file: Path, overrides: list[str], corrected: bool, tmp_path: Path
) -> None:
    config = load_config(file, overrides)
    pre_train, post_train = config.phases
    assert pre_train.importance_correction is None
    assert post_train.importance_correction == (Truncated() if corrected else None)
    dump_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_correction_can_be_a_different_one_or_none() -> None:
    config = load_config(FP8, ["phases.1.importance_correction={name: masked}"])
    assert config.phases[1].importance_correction == Masked()
    assert load_config(FP8, ["phases.1.importance_correction=null"]).phases[1].importance_correction is None


@pytest.mark.parametrize(
    ("overrides", "shape", "named"),
    [
        ([], QWEN3_8B, None),
        (["engine.tensor_parallel_size=8"], QWEN3_8B, None),
        (["rollout.deterministic=true"], QWEN3_8B, "engine.quantization, rollout.deterministic"),
        (["model.dtype=float32"], QWEN3_8B, "engine.quantization, model.dtype"),
        (
            ["engine.extra_arguments={load_format: auto}"], QWEN3_8B,
            "engine.quantization, engine.extra_arguments.load_format",
        ),
        (["engine.tensor_parallel_size=16"], QWEN3_8B, "engine.quantization, engine.tensor_parallel_size"),
        (
            ["engine.tensor_parallel_size=4"],
            ModelShape(48, 32, 4, 6144, 40960, experts=128, expert_feed_forward_size=768, key_value_size=512),
            "engine.quantization, engine.tensor_parallel_size",
        ),
    ],
)  # fmt: skip
def test_what_conflicts_with_fp8_is_named(overrides: list[str], shape: ModelShape, named: str | None) -> None:
    config = load_config(FP8, overrides)
    problems = numerics_problems(config.engine, config.rollout, config.model.dtype, shape)
    assert [fields for fields, _ in problems] == ([named] if named else [])


def test_speculation_is_not_deterministic() -> None:
    config = load_config(PLAIN, ["engine.extra_arguments={speculative_algorithm: NGRAM}", "rollout.deterministic=true"])
    ((fields, problem),) = numerics_problems(config.engine, config.rollout, config.model.dtype, QWEN3_8B)
    assert fields.endswith("rollout.deterministic") and "seeds" in problem


def test_an_evaluation_does_not_quantise() -> None:
    with pytest.raises(UserError, match="quantization is for training"):
        validated(BenchmarkRunConfig, {"model": {"path": "m"}, "engine": {"quantization": "fp8"}}, {}, "eval")
