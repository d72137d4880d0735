"""Rotary position embeddings (RoPE) in config.json: plain, or scaled by YaRN (arXiv 2309.00071) for longer contexts.

Qwen3's model cards extend 32,768 tokens to 131,072 by `"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
"original_max_position_embeddings": 32768}`. Transformers 5 writes the same into `rope_parameters`, with the base.
Only fields that Transformers, SGLang and Megatron-core read alike are accepted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dsrl.common.errors import UserError

SECTIONS = ("rope_parameters", "rope_scaling")
_YARN_FIELDS = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
_EVERY_FIELD = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters, with the names of config.json."""

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
        """What cosines and sines are multiplied by."""
        return 0.1 * math.log(self.factor) + 1.0

    @property
    def context_tokens(self) -> int:
        """The extended context length."""
        return int(self.factor * self.original_max_position_embeddings)


def read_rope(config: Mapping[str, Any], path: Path) -> tuple[float, Yarn | None]:
    """The RoPE base, and YaRN's parameters if the model has them.

    Args:
        config: content of config.json.
        path: path of config.json, for messages.

    Raises:
        UserError: a field has a wrong value, asks for another kind of scaling, or contradicts another field.
    """
    section = _section(config, path)
    theta = section.get("rope_theta", config.get("rope_theta"))
    if not _is_number(theta) or theta <= 0:
        raise UserError(f"{path}: neither rope_parameters.rope_theta nor rope_theta holds a positive number")
    if section.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{path}: partial_rotary_factor is not supported; only embeddings of the whole head are")
    kind = section.get("rope_type", section.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "yarn":
        raise UserError(f"{path}: RoPE scaling of type {kind!r} is not supported; only plain RoPE and 'yarn' are")
    return float(theta), _yarn(section, config, path)


def _section(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The section that counts."""
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
            f"{path}: rope_scaling and rope_parameters both stand there and differ; put all fields, rope_theta "
            "included, into rope_parameters and remove rope_scaling"
        )
    return next(iter(given.values()), {})


def _yarn(section: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> Yarn:
    # As Transformers: a field outside the section wins, and the default is the whole context length.
    original = (
        config.get("original_max_position_embeddings")
        or section.get("original_max_position_embeddings")
        or config.get("max_position_embeddings")
    )
    if not isinstance(original, int) or isinstance(original, bool) or original < 1:
        raise UserError(f"{path}: original_max_position_embeddings must be a positive integer, not {original!r}")
    yarn = Yarn(
        factor=_number(section, "factor", None, path),
        original_max_position_embeddings=original,
        beta_fast=_number(section, "beta_fast", Yarn.beta_fast, path),
        beta_slow=_number(section, "beta_slow", Yarn.beta_slow, path),
    )
    if yarn.factor < 1:
        raise UserError(f"{path}: YaRN's factor must be at least 1, not {yarn.factor}")
    _refuse_other_fields(section, yarn, path)
    return yarn


def _refuse_other_fields(section: Mapping[str, Any], yarn: Yarn, path: Path) -> None:
    for name, value in section.items():
        is_default = value is None or (name == "truncate" and value is True)
        if name == "attention_factor" and _is_number(value):
            is_default = math.isclose(value, yarn.attention_factor, abs_tol=1e-6)
        if name not in _YARN_FIELDS | _EVERY_FIELD and not is_default:
            raise UserError(
                f"{path}: YaRN's {name}={value!r} is not supported, because Transformers, SGLang and Megatron-core do "
                f"not read it alike; only {', '.join(sorted(_YARN_FIELDS))} are"
            )


def _number(section: Mapping[str, Any], name: str, default: float | None, path: Path) -> float:
    value = default if section.get(name) is None else section[name]
    if not _is_number(value) or value <= 0:
        raise UserError(f"{path}: YaRN's {name} must be a positive number, not {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
