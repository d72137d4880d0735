"""The Qwen3 table against the names of Transformers, of Megatron's local layers, and of Transformer Engine's."""

import pytest

from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.weights.table import TableEntry, WeightTable
from megatron_dsrl.weights.tables import weight_table
from tests.support.tiny_model import make_tiny_qwen3

TRANSFORMER_ENGINE_LAYER = {
    # Parameters of a TransformerLayer with Megatron's Transformer Engine specification and qk_layernorm
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}


@pytest.mark.parametrize("tied", [True, False])
def test_hf_names_and_shapes_are_those_of_transformers(tmp_path, tied):
    model = make_tiny_qwen3(tmp_path, tied=tied)
    table = weight_table(read_architecture(tmp_path))
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert table.hf_shapes() == parameters


def test_every_parameter_of_a_transformer_engine_layer_has_a_rule(tmp_path):
    make_tiny_qwen3(tmp_path, tied=False)
    table = weight_table(read_architecture(tmp_path))
    prefix = "decoder.layers.{layer}."
    last_names = {rule.megatron[-1].removeprefix(prefix) for rule in table.rules if rule.per_layer}
    assert last_names == TRANSFORMER_ENGINE_LAYER


def test_fused_norms_are_the_hf_norms_before_the_same_matrix(tmp_path):
    make_tiny_qwen3(tmp_path, tied=False)
    table = weight_table(read_architecture(tmp_path))

    def hf_names(megatron_name: str) -> list[str]:
        rule = next(rule for rule in table.rules if megatron_name in rule.megatron)
        return [tensor.name for tensor in TableEntry(rule, 3).hf]

    assert hf_names("decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight") == [
        "model.layers.3.input_layernorm.weight"
    ]
    assert hf_names("decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight") == [
        "model.layers.3.post_attention_layernorm.weight"
    ]


def test_entries_come_in_the_order_of_the_model(tmp_path):
    make_tiny_qwen3(tmp_path, tied=False)
    table: WeightTable = weight_table(read_architecture(tmp_path))
    names = [tensor.name for entry in table.entries() for tensor in entry.hf]
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert layers == sorted(layers) and set(layers) == {0, 1, 2, 3}
