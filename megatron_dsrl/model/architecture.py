"""Read and validate the HF `config.json` of a model of a supported family."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.hub import lfs_advice
from megatron_dsrl.common.numbers import positive_integer, positive_number
from megatron_dsrl.config.layout import ModelShape
from megatron_dsrl.model.rope import RopeScaling, Yarn, read_rope


@dataclass(frozen=True)
class Family:
    """The distinguishing features of one HF architecture."""

    hf_name: str
    """Name in `architectures` of config.json."""
    qk_layernorm: bool
    """RMSNorm on each head's query and key."""
    qkv_bias: bool
    """Biases in the query, key and value projections."""
    has_experts: bool = False
    """A mixture of experts as feed-forward in every layer."""
    default_head_dim: int | None = None
    """Default if config.json gives none; None means hidden size / heads."""
    default_rope_theta: float | None = None
    """Default if config.json gives none; None means that it must give one."""

    def __str__(self) -> str:
        return self.hf_name


FAMILIES = {
    family.hf_name: family
    for family in (
        Family("Qwen3ForCausalLM", qk_layernorm=True, qkv_bias=False, default_head_dim=128),
        Family("Qwen3MoeForCausalLM", qk_layernorm=True, qkv_bias=False, has_experts=True, default_head_dim=128),
        Family("Qwen2ForCausalLM", qk_layernorm=False, qkv_bias=True),  # also the name of Qwen2.5
        # Llama 2 and 3, and others with their layers, such as SmolLM2. Llama 2's config.json may lack the RoPE base.
        Family("LlamaForCausalLM", qk_layernorm=False, qkv_bias=False, default_rope_theta=1e4),
    )
}
"""The supported families, by the name in config.json. They share everything else: RMSNorm before attention and
feed-forward, grouped query attention with rotary embeddings on the whole head, SwiGLU, no other biases, no dropout. To
add another architecture of this kind, add an entry here."""


REFERENCE_MAY_DIFFER = ("max_position_embeddings", "initializer_range")
"""Fields of `Architecture` that do not matter to a reference policy, which is computed like the policy."""
CRITIC_MAY_DIFFER = (*REFERENCE_MAY_DIFFER, "tie_word_embeddings")
"""Those that do not matter to a critic, which has no output layer."""


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of every layer."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    """Feed-forward size of one expert."""
    norm_topk_prob: bool
    """Whether the chosen experts' probabilities are divided by their sum."""


@dataclass(frozen=True)
class Architecture:
    """Shapes and constants of a model. Names are those of the HF configuration."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    initializer_range: float
    experts: Experts | None = None
    """None for a dense model."""
    rope_scaling: RopeScaling | None = None
    """None for plain RoPE."""

    @property
    def shape(self) -> ModelShape:
        """The sizes that layout checks need."""
        return ModelShape(
            layers=self.num_hidden_layers,
            attention_heads=self.num_attention_heads,
            key_value_groups=self.num_key_value_heads,
            feed_forward_size=self.intermediate_size,
            context_tokens=self.max_position_embeddings,
            yarn_context_tokens=self.rope_scaling.context_tokens if isinstance(self.rope_scaling, Yarn) else 0,
            experts=self.experts.num_experts if self.experts else 0,
            expert_feed_forward_size=self.experts.moe_intermediate_size if self.experts else 0,
            key_value_size=self.num_key_value_heads * self.head_dim,
        )

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Rows of Megatron's embedding: vocab_size rounded up to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // tensor_parallel_size) * tensor_parallel_size


def read_architecture(folder: Path) -> Architecture:
    """Read `config.json`. Raises UserError if the file is missing or not JSON, the architecture is not supported, a
    field is missing or has the wrong type, or an unsupported feature is requested (other RoPE scaling or biases,
    sliding window)."""
    path = folder / "config.json"
    config = _read_json(path)
    return _architecture(config, _family(config, path), path)


def check_same_architecture(
    field: str, folder: Path, policy: Architecture, may_differ: Sequence[str] = REFERENCE_MAY_DIFFER
) -> Architecture:
    """Check that a critic or reference can be computed like the policy. Raises UserError if it has no config.json, or
    one that differs in other fields.

    Args:
        field: configuration field that names the model.
        folder: the model's folder; a classifier's will do.
        may_differ: fields of `Architecture`.

    Returns:
        The model's own architecture.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(
            f"{field}: {folder} has no config.json, which says whether its architecture is the policy's; name an HF "
            "folder or a converted checkpoint (`dsrl convert megatron-to-hf` converts a run's checkpoint)"
        )
    config = _read_json(path)
    names_family = config.get("architectures") in [[name] for name in FAMILIES]
    family = _family(config, path) if names_family else policy.family
    other = _architecture(config, family, path)
    compared = [each.name for each in fields(policy) if each.name not in may_differ]
    names = [name for name in compared if getattr(other, name) != getattr(policy, name)]
    if names:
        theirs, ours = (", ".join(f"{name} {getattr(model, name)}" for name in names) for model in (other, policy))
        raise UserError(f"{field}: {folder} must have the policy's architecture, but has {theirs}; the policy: {ours}")
    return other


def _architecture(config: dict[str, Any], family: Family, path: Path) -> Architecture:
    _refuse_unsupported_features(config, path)
    if family.has_experts:
        _refuse_dense_layers_among_experts(config, path)
    theta, scaling = read_rope(config, path, family.default_rope_theta)
    context_tokens = _integer(config, "max_position_embeddings", path)
    if isinstance(scaling, Yarn) and context_tokens > scaling.context_tokens:  # SGLang has no angles beyond
        raise UserError(
            f"{path}: max_position_embeddings is {context_tokens}, but YaRN's factor {scaling.factor:g} x "
            f"original_max_position_embeddings reaches {scaling.context_tokens}; lower the limit or raise the factor"
        )
    hidden_size, heads = _integer(config, "hidden_size", path), _integer(config, "num_attention_heads", path)
    return Architecture(
        family=family,
        vocab_size=_integer(config, "vocab_size", path),
        hidden_size=hidden_size,
        intermediate_size=_integer(config, "intermediate_size", path),
        num_hidden_layers=_integer(config, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_key_value_heads=_integer(config, "num_key_value_heads", path, default=heads),
        head_dim=_integer(config, "head_dim", path, default=family.default_head_dim or hidden_size // heads),
        max_position_embeddings=context_tokens,
        rms_norm_eps=positive_number(config.get("rms_norm_eps", 1e-6), f"{path}: rms_norm_eps"),
        rope_theta=theta,
        tie_word_embeddings=_flag(config, "tie_word_embeddings", path),
        initializer_range=positive_number(config.get("initializer_range", 0.02), f"{path}: initializer_range"),
        experts=_experts(config, path) if family.has_experts else None,
        rope_scaling=scaling,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not an HF model folder: it has no config.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {lfs_advice(path) or error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return config


def _family(config: dict[str, Any], path: Path) -> Family:
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    if len(architectures) != 1 or architectures[0] not in FAMILIES:
        named = ", ".join(map(str, architectures)) or "no architecture"
        raise UserError(f"{path}: architectures names {named}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[architectures[0]]


def _experts(config: dict[str, Any], path: Path) -> Experts:
    # Transformers wrote `num_experts` up to version 4 and writes `num_local_experts` since.
    count = "num_local_experts" if "num_local_experts" in config else "num_experts"
    return Experts(
        num_experts=_integer(config, count, path),
        num_experts_per_tok=_integer(config, "num_experts_per_tok", path),
        moe_intermediate_size=_integer(config, "moe_intermediate_size", path),
        norm_topk_prob=_flag(config, "norm_topk_prob", path),
    )


def _integer(config: dict[str, Any], field: str, path: Path, default: int | None = None) -> int:
    return positive_integer(default if config.get(field) is None else config[field], f"{path}: {field}")


def _flag(config: dict[str, Any], field: str, path: Path) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {field} must be true or false, not {value!r}")
    return value


def _refuse_unsupported_features(config: dict[str, Any], path: Path) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act {config['hidden_act']!r} is not supported; only 'silu' is")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UserError(f"{path}: {name} is not supported; published Qwen3 and Llama models have none")
    if config.get("use_sliding_window"):
        raise UserError(f"{path}: use_sliding_window is not supported")
    if config.get("attention_dropout"):
        raise UserError(f"{path}: attention_dropout is not supported; set it to 0")
    if config.get("quantization_config"):
        raise UserError(f"{path}: quantization_config is not supported; use the model that was quantised")


def _refuse_dense_layers_among_experts(config: dict[str, Any], path: Path) -> None:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise UserError(
            f"{path}: decoder_sparse_step and mlp_only_layers make some layers dense; only models with experts in "
            "every layer are supported"
        )
