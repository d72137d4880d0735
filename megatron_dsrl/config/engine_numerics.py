"""Runs whose engines compute with different numerics than the trainer: FP8 weights, or speculative decoding.

Their samples come from a slightly different policy than the trainer scores, so objectives in post-train space correct
for it unless they say otherwise. In asynchronous runs, whose samples come from older weights, the loss's ratio does
that (`algorithms/objective.py`), and only a loss without one needs the correction.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_dsrl.common.numbers import counted
from megatron_dsrl.config.choices import LOSSES
from megatron_dsrl.config.layout import ModelShape, Problem
from megatron_dsrl.config.rollout import EngineConfig, RolloutConfig

SPECULATION = "speculative_algorithm"
"""SGLang's server argument."""
FP8_BLOCK = 128
SET_BY_QUANTIZATION = ("quantization", "json_model_override_args", "load_format")
"""Server arguments that `engine.quantization` sets, or that contradict it."""
CORRECTION = {"name": "truncated"}


def with_correction(data: Any) -> Any:
    """A run's plain data with an importance correction in every objective in post-train space that names none and needs
    one. Ill-typed data is left to the validation."""
    if not isinstance(data, Mapping):
        return data
    rollout, phases = data.get("rollout"), data.get("phases")
    differs = _differs(data.get("engine"))
    is_asynchronous = isinstance(rollout, Mapping) and bool(rollout.get("max_staleness"))
    if not (differs or is_asynchronous) or not isinstance(phases, Sequence) or isinstance(phases, str):
        return data
    return {**data, "phases": [_corrected_phase(phase, only_without_ratio=not differs) for phase in phases]}


def numerics_problems(
    engine: EngineConfig, rollout: RolloutConfig, dtype: str, shape: ModelShape | None
) -> Iterator[Problem]:
    """Settings that conflict with such an engine; without a `shape`, only those that do not depend on it."""
    if SPECULATION in engine.extra_arguments and rollout.deterministic:
        yield (
            f"engine.extra_arguments.{SPECULATION}, rollout.deterministic",
            "speculative decoding ignores the samples' seeds; turn one of them off",
        )
    if engine.quantization is None:
        return
    if rollout.deterministic:
        yield (
            "engine.quantization, rollout.deterministic",
            "SGLang's FP8 products depend on what else is in the batch; turn one of them off",
        )
    if dtype != "bfloat16":
        yield "engine.quantization, model.dtype", "SGLang's FP8 layers take bfloat16 activations; set bfloat16"
    for name in SET_BY_QUANTIZATION:
        if name in engine.extra_arguments:
            yield f"engine.quantization, engine.extra_arguments.{name}", "the first sets this argument; leave it out"
    yield from _shape_problems(engine.tensor_parallel_size, shape)


def _shape_problems(engine_size: int, shape: ModelShape | None) -> Iterator[Problem]:
    """SGLang refuses blocks that span two ranks, or two of the matrices that it fuses."""
    if shape is None:
        return
    inner = shape.expert_feed_forward_size if shape.experts else shape.feed_forward_size
    for what, size in (("inner size", inner), ("size of all keys", shape.key_value_size)):
        if size % (FP8_BLOCK * engine_size):
            yield (
                "engine.quantization, engine.tensor_parallel_size",
                f"the model's {what} is {size}, which {counted(engine_size, 'rank')} cannot divide into blocks of "
                f"{FP8_BLOCK}; lower the second, or leave out the first",
            )


def _differs(engine: Any) -> bool:
    if not isinstance(engine, Mapping):
        return False
    extra = engine.get("extra_arguments")
    arguments = extra if isinstance(extra, Mapping) else {}
    return engine.get("quantization") is not None or SPECULATION in arguments or "quantization" in arguments


def _corrected_phase(phase: Any, only_without_ratio: bool) -> Any:
    if not isinstance(phase, Mapping):
        return phase
    additional = phase.get("additional_objectives")
    if isinstance(additional, Sequence) and not isinstance(additional, str):
        phase = {**phase, "additional_objectives": [_corrected(one, only_without_ratio) for one in additional]}
    return _corrected(phase, only_without_ratio)


def _corrected(objective: Any, only_without_ratio: bool) -> Any:
    if not isinstance(objective, Mapping) or "importance_correction" in objective:
        return objective
    space = objective.get("space")
    name = space.get("name") if isinstance(space, Mapping) else space
    if name != "post_train":
        return objective
    if only_without_ratio and not getattr(LOSSES.options_class(objective.get("loss")), "on_policy_only", False):
        return objective
    return {**objective, "importance_correction": CORRECTION}
