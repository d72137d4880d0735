"""The weight tables of the supported HF architectures, in the order of the model's computation."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.weights import decoder_rules as rules
from megatron_dsrl.weights.table import TensorRule, WeightTable


def qwen3_layer(a: Architecture) -> tuple[TensorRule, ...]:
    """Dense Qwen3: norms on queries and keys."""
    return (
        rules.attention_norm(a),
        rules.query_key_value(a),
        *rules.query_key_norms(a),
        rules.attention_output(a),
        *rules.feed_forward(a),
    )


def qwen3_moe_layer(a: Architecture) -> tuple[TensorRule, ...]:
    """Qwen3-MoE: attention as in Qwen3, with experts."""
    return (
        rules.attention_norm(a),
        rules.query_key_value(a),
        *rules.query_key_norms(a),
        rules.attention_output(a),
        *rules.experts(a),
    )


def qwen2_layer(a: Architecture) -> tuple[TensorRule, ...]:
    """Qwen2 and Qwen2.5: biases on queries, keys and values, and no norms on them."""
    return (
        rules.attention_norm(a),
        rules.query_key_value(a),
        rules.query_key_value_bias(a),
        rules.attention_output(a),
        *rules.feed_forward(a),
    )


def llama_layer(a: Architecture) -> tuple[TensorRule, ...]:
    """Llama: neither biases nor norms on queries and keys."""
    return (
        rules.attention_norm(a),
        rules.query_key_value(a),
        rules.attention_output(a),
        *rules.feed_forward(a),
    )


LAYERS: Mapping[str, Callable[[Architecture], tuple[TensorRule, ...]]] = {
    "Qwen3ForCausalLM": qwen3_layer,
    "Qwen3MoeForCausalLM": qwen3_moe_layer,
    "Qwen2ForCausalLM": qwen2_layer,
    "LlamaForCausalLM": llama_layer,
}


def weight_table(architecture: Architecture) -> WeightTable:
    """The two-way table of a model."""
    layer = LAYERS[architecture.family.hf_name](architecture)
    return WeightTable(
        (rules.embedding(architecture), *layer, rules.final_norm(architecture), *rules.head(architecture)),
        num_layers=architecture.num_hidden_layers,
        num_experts=architecture.experts.num_experts if architecture.experts else 0,
        # Checkpoints with tied embeddings may contain the head as well. If it differs from the embedding, Transformers
        # ignores the configuration and uses it, so this is refused here.
        copies={rules.HF_HEAD: rules.HF_EMBEDDING} if architecture.tie_word_embeddings else {},
    )


def value_model_table(architecture: Architecture) -> WeightTable:
    """The table of a critic: the same decoder with a value head instead of the output head."""
    untied = replace(architecture, tie_word_embeddings=False)
    table = weight_table(untied)
    trunk = [rule for rule in table.rules if rule not in rules.head(untied)]
    return replace(table, rules=(*trunk, *rules.value_head(architecture)), copies={})
