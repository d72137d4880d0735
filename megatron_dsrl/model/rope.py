"""Rotary position embeddings (RoPE) in config.json: plain, or scaled for longer contexts by YaRN or as in Llama 3.

YaRN (arXiv 2309.00071): Qwen3's model cards extend 32,768 tokens to 131,072 by `"rope_scaling": {"rope_type": "yarn",
"factor": 4.0, "original_max_position_embeddings": 32768}`. Llama 3.1 and later have `"rope_type": "llama3"`.
Transformers 5 writes the same into `rope_parameters`, with the base. Only fields that Transformers, SGLang and
Megatron-core interpret in the same way are accepted.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.numbers import is_number, positive_integer, positive_number

SECTIONS = ("rope_parameters", "rope_scaling")
_EVERY_FIELD = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters, with the names of config.json."""

    rope_type: ClassVar[str] = "yarn"

    factor: float
    """Context length that the model is extended to, divided by the original one."""
    original_max_position_embeddings: int
    """Context length of pre-training, in tokens."""
    beta_fast: float = 32.0
    """Dimensions that rotate at least this often within the original length keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions that rotate at most this often have theirs divided by `factor`."""

    @property
    def attention_factor(self) -> float:
        """Factor on cosines and sines."""
        return 0.1 * math.log(self.factor) + 1.0

    @property
    def context_tokens(self) -> int:
        """The extended context length."""
        return int(self.factor * self.original_max_position_embeddings)


@dataclass(frozen=True)
class Llama3Scaling:
    """The scaling of Llama 3.1 and later, with the names of config.json. Cosines and sines are not multiplied."""

    rope_type: ClassVar[str] = "llama3"

    factor: float
    """Divides the low frequencies."""
    low_freq_factor: float
    """Frequencies are low if the dimension rotates less often than this within the original length."""
    high_freq_factor: float
    """Dimensions that rotate more often than this keep their frequency; in between it is interpolated."""
    original_max_position_embeddings: int
    """Context length of pre-training, in tokens."""


RopeScaling = Yarn | Llama3Scaling


def read_rope(
    config: Mapping[str, Any], path: Path, default_theta: float | None = None
) -> tuple[float, RopeScaling | None]:
    """The RoPE base from the content of config.json, else `default_theta`, and the parameters of the scaling if the
    model has one.

    Raises UserError if a field has a wrong value, asks for another kind of scaling, or contradicts another field.
    """
    section = _section(config, path)
    theta = section.get("rope_theta", config.get("rope_theta", default_theta))
    if not is_number(theta) or theta <= 0:
        raise UserError(f"{path}: neither rope_parameters.rope_theta nor rope_theta holds a positive number")
    # As in Transformers, a factor outside the section counts as well.
    if section.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1.0):
        raise UserError(f"{path}: partial_rotary_factor is not supported; only embeddings of the whole head are")
    kind = str(section.get("rope_type", section.get("type", "default")))
    if kind == "default":
        return float(theta), None
    if kind not in _READERS:
        supported = ", ".join(map(repr, _READERS))
        raise UserError(f"{path}: RoPE scaling of type {kind!r} is not supported; only plain RoPE and {supported} are")
    return float(theta), _READERS[kind](section, config, path)


def _section(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    given = {}
    for name in SECTIONS:
        section = config.get(name) or {}
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} must be an object, not {section!r}")
        if section:
            given[name] = section
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        # Transformers then ignores rope_parameters, with the base in it, and takes 10,000.
        raise UserError(
            f"{path}: rope_scaling and rope_parameters are both set and differ; put all fields, rope_theta "
            "included, into rope_parameters and remove rope_scaling"
        )
    return next(iter(given.values()), {})


def _yarn(section: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> Yarn:
    # Like Transformers: the default is the whole context length.
    original = _original_context(section, config, config.get("max_position_embeddings"), path)
    yarn = Yarn(
        factor=_number(section, "factor", None, path),
        original_max_position_embeddings=original,
        beta_fast=_number(section, "beta_fast", Yarn.beta_fast, path),
        beta_slow=_number(section, "beta_slow", Yarn.beta_slow, path),
    )
    _check(yarn, section, {"truncate": True, "attention_factor": yarn.attention_factor}, path)
    return yarn


def _llama3(section: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=_number(section, "factor", None, path),
        low_freq_factor=_number(section, "low_freq_factor", None, path),
        high_freq_factor=_number(section, "high_freq_factor", None, path),
        original_max_position_embeddings=_original_context(section, config, None, path),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(f"{path}: RoPE scaling: high_freq_factor must be greater than low_freq_factor")
    _check(scaling, section, {}, path)
    return scaling


_READERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any], Path], RopeScaling]] = {
    "yarn": _yarn,
    "llama3": _llama3,
}
"""Readers by `rope_type`, called with the section, all of config.json, and its path."""


def _original_context(section: Mapping[str, Any], config: Mapping[str, Any], default: Any, path: Path) -> int:
    """Context length of pre-training. As in Transformers, a field outside the section wins."""
    name = "original_max_position_embeddings"
    return positive_integer(config.get(name) or section.get(name) or default, f"{path}: {name}")


def _check(scaling: RopeScaling, section: Mapping[str, Any], defaults: Mapping[str, Any], path: Path) -> None:
    """Refuse a factor below 1, and fields other than the scaling's, unless they have these defaults."""
    kind, names = scaling.rope_type, {field.name for field in fields(scaling)}
    if scaling.factor < 1:
        raise UserError(f"{path}: RoPE scaling: factor must be at least 1, not {scaling.factor}")
    for name, value in section.items():
        is_default = value is None or (name in defaults and _equal(value, defaults[name]))
        if name not in names | _EVERY_FIELD and not is_default:
            raise UserError(
                f"{path}: {name}={value!r} is not supported with RoPE scaling {kind!r}, because Transformers, SGLang "
                f"and Megatron-core interpret it differently; only {', '.join(sorted(names))} are"
            )


def _number(section: Mapping[str, Any], name: str, default: float | None, path: Path) -> float:
    value = default if section.get(name) is None else section[name]
    return positive_number(value, f"{path}: RoPE scaling: {name}")


def _equal(value: Any, default: float) -> bool:
    return type(value) is type(default) and math.isclose(value, default, abs_tol=1e-6)
