"""The weight table of a model of any supported family, in the order of its computation."""

from dataclasses import replace

from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.weights import decoder_rules as rules
from megatron_dsrl.weights.table import TensorRule, WeightTable


def layer_rules(a: Architecture) -> tuple[TensorRule, ...]:
    """The tensors of every layer, as the family's features say."""
    family = a.family
    return (
        rules.attention_norm(a),
        rules.query_key_value(a),
        *((rules.query_key_value_bias(a),) if family.qkv_bias else ()),
        *(rules.query_key_norms(a) if family.qk_layernorm else ()),
        rules.attention_output(a),
        *(rules.experts(a) if family.has_experts else rules.feed_forward(a)),
    )


def weight_table(architecture: Architecture) -> WeightTable:
    """The two-way table of a model."""
    layer = layer_rules(architecture)
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
