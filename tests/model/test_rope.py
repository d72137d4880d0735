"""RoPE in config.json: the base, the two kinds of scaling, and what is refused."""

from pathlib import Path

import pytest
from transformers import Qwen3Config
from transformers.modeling_rope_utils import _compute_yarn_parameters

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.model.rope import Llama3Scaling, Yarn, read_rope

PATH = Path("config.json")
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""As Qwen3's model cards give it."""
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""As in Llama 3.1's config.json."""


def test_the_base_stands_beside_the_sections_or_in_them() -> None:
    assert read_rope({"rope_theta": 1e6, "rope_scaling": None}, PATH) == (1e6, None)
    assert read_rope({"rope_theta": 1e4, "rope_parameters": PLAIN}, PATH) == (1e6, None)
    assert read_rope({"rope_parameters": PLAIN, "rope_scaling": PLAIN}, PATH) == (1e6, None)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 1e6, "rope_scaling": CARD},
        {"rope_parameters": CARD | {"rope_theta": 1e6, "attention_factor": None}},
        {"rope_parameters": CARD | {"rope_theta": 1e6, "attention_factor": 1.1386294361119891, "truncate": True}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 32768},
    ],
)
def test_yarn_is_read_from_either_section(config) -> None:
    assert read_rope(config, PATH) == (1e6, Yarn(4.0, 32768))
    assert Yarn(4.0, 32768).context_tokens == 131072


def test_the_scaling_of_llama_3() -> None:
    assert read_rope({"rope_theta": 5e5, "rope_scaling": LLAMA31}, PATH) == (5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192))


def test_a_family_may_have_a_default_base() -> None:
    """Llama 2's config.json has none."""
    assert read_rope({"rope_scaling": None}, PATH, default_theta=1e4) == (1e4, None)
    assert read_rope({"rope_theta": 5e5}, PATH, default_theta=1e4) == (5e5, None)


@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0])
def test_the_attention_factor_is_that_of_transformers(factor) -> None:
    config = Qwen3Config(rope_parameters=CARD | {"rope_theta": 1e6, "factor": factor})
    assert Yarn(factor, 32768).attention_factor == pytest.approx(_compute_yarn_parameters(config)[1], rel=1e-12)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": PLAIN, "rope_scaling": CARD}, "rope_scaling and rope_parameters are both set and differ"),
        ({"rope_parameters": CARD, "rope_scaling": PLAIN}, "rope_scaling and rope_parameters are both set and differ"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear"}}, "RoPE scaling of type 'linear' is not supported"),
        ({"rope_theta": 1e6, "rope_scaling": CARD | {"factor": None}}, "factor must be a positive number, not None"),
        ({"rope_theta": 1e6, "rope_scaling": CARD | {"factor": "4"}}, "factor must be a positive number, not '4'"),
        ({"rope_theta": 1e6, "rope_scaling": CARD | {"factor": 0.5}}, "factor must be at least 1, not 0.5"),
        ({"rope_theta": 1e6, "rope_scaling": CARD | {"beta_fast": True}}, "beta_fast must be a positive number"),
        (
            {"rope_theta": 1e6, "rope_scaling": CARD | {"original_max_position_embeddings": 1.5}},
            "original_max_position_embeddings must be a positive integer, not 1.5",
        ),
        ({"rope_theta": 1e6, "rope_scaling": CARD | {"attention_factor": 2.0}}, "attention_factor=2.0 is not"),
        ({"rope_theta": 1e6, "rope_scaling": CARD | {"mscale": 1.0}}, "mscale=1.0 is not supported with RoPE scaling"),
        ({"rope_theta": 1e6, "rope_scaling": CARD | {"truncate": False}}, "truncate=False is not supported"),
        ({"rope_theta": 1e6, "rope_scaling": CARD | {"extrapolation_factor": 2}}, "extrapolation_factor=2 is"),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA31 | {"factor": None}}, "factor must be a positive number, not N"),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA31 | {"low_freq_factor": 4}}, "high_freq_factor must be greater"),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA31 | {"beta_fast": 32}}, "beta_fast=32 is not supported with"),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA31 | {"original_max_position_embeddings": None}},
            "original_max_position_embeddings must be a positive integer, not None",
        ),
        ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ({"rope_theta": 1e6, "partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"rope_parameters": "plain"}, "rope_parameters must be an object, not 'plain'"),
        ({"rope_theta": None}, "neither rope_parameters.rope_theta nor rope_theta"),
    ],
)
def test_what_the_three_libraries_interpret_differently_is_refused(config, message) -> None:
    with pytest.raises(UserError, match=message):
        read_rope(config, PATH)
