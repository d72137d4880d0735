"""The weight table of a model of any supported family, in the order of its computation, and the rules in it.

If a rule has two Megatron names, the first is that of local layers. The second is Transformer Engine's, for a norm that
it fuses into the following matrix, or for an expert in its grouped matrix products.
"""

from dataclasses import replace

from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.weights.layouts import GateAndUp, GroupedQkv, Replicated, Shape, Split, Vocabulary
from megatron_dsrl.weights.table import HfTensor, Initial, TensorRule, WeightTable

HF_LAYER = "model.layers.{layer}."
HF_EXPERT = HF_LAYER + "mlp.experts.{expert}."
LAYER = "decoder.layers.{layer}."
EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_HEAD = "lm_head.weight"


def embedding(a: Architecture) -> TensorRule:
    """The input embedding."""
    # With tied embeddings the last pipeline stage keeps a copy of the embedding under the head's name.
    return TensorRule(
        (HfTensor(HF_EMBEDDING, (a.vocab_size, a.hidden_size)),),
        (EMBEDDING, HEAD) if a.tie_word_embeddings else (EMBEDDING,),
        Vocabulary(a.vocab_size),
    )


def final_norm(a: Architecture) -> TensorRule:
    """The norm after the layers."""
    return _norm("model.norm.weight", a.hidden_size, "decoder.final_layernorm.weight")


def head(a: Architecture) -> tuple[TensorRule, ...]:
    """The output head, unless it is tied to the embedding."""
    if a.tie_word_embeddings:
        return ()
    return (TensorRule((HfTensor(HF_HEAD, (a.vocab_size, a.hidden_size)),), (HEAD,), Vocabulary(a.vocab_size)),)


def value_head(a: Architecture) -> tuple[TensorRule, ...]:
    """A scalar output, with the names of a Transformers token classifier with one label."""
    return (
        TensorRule((HfTensor("score.weight", (1, a.hidden_size)),), (HEAD,), Replicated(), initial="zeros"),
        TensorRule((HfTensor("score.bias", (1,)),), ("output_layer.bias",), Replicated(), initial="zeros"),
    )


def attention_norm(a: Architecture) -> TensorRule:
    """The norm before attention."""
    fused = LAYER + "self_attention.linear_qkv.layer_norm_weight"
    return _norm(
        HF_LAYER + "input_layernorm.weight", a.hidden_size, LAYER + "input_layernorm.weight", fused, stored_as=fused
    )


def query_key_value(a: Architecture) -> TensorRule:
    """The projections to queries, keys and values."""
    return _query_key_value(a, "weight", (a.hidden_size,), "normal")


def query_key_value_bias(a: Architecture) -> TensorRule:
    """The biases of these projections."""
    return _query_key_value(a, "bias", (), "zeros")


def query_key_norms(a: Architecture) -> tuple[TensorRule, ...]:
    """The norms on each head's query and key."""
    return tuple(
        _norm(
            HF_LAYER + f"self_attn.{short}_norm.weight",
            a.head_dim,
            LAYER + f"self_attention.{short}_layernorm.weight",
        )
        for short in ("q", "k")
    )


def attention_output(a: Architecture) -> TensorRule:
    """The output projection of attention."""
    return TensorRule(
        (HfTensor(HF_LAYER + "self_attn.o_proj.weight", (a.hidden_size, a.num_attention_heads * a.head_dim)),),
        (LAYER + "self_attention.linear_proj.weight",),
        Split(1),
    )


def feed_forward(a: Architecture) -> tuple[TensorRule, ...]:
    """A dense SwiGLU and the norm before it."""
    fused = LAYER + "mlp.linear_fc1.layer_norm_weight"
    return (
        _norm(
            HF_LAYER + "post_attention_layernorm.weight",
            a.hidden_size,
            LAYER + "pre_mlp_layernorm.weight",
            fused,
            stored_as=fused,
        ),
        TensorRule(
            (
                HfTensor(HF_LAYER + "mlp.gate_proj.weight", (a.intermediate_size, a.hidden_size)),
                HfTensor(HF_LAYER + "mlp.up_proj.weight", (a.intermediate_size, a.hidden_size)),
            ),
            (LAYER + "mlp.linear_fc1.weight",),
            GateAndUp(),
        ),
        TensorRule(
            (HfTensor(HF_LAYER + "mlp.down_proj.weight", (a.hidden_size, a.intermediate_size)),),
            (LAYER + "mlp.linear_fc2.weight",),
            Split(1),
        ),
    )


def experts(a: Architecture) -> tuple[TensorRule, ...]:
    """SwiGLU experts, their router, and the norm before them.

    Names are those of the files on the hub, one set per expert. In memory, Transformers 5 keeps all experts of a layer
    in two fused tensors (`gate_up_proj`, `down_proj`), but it reads and writes files with the names used here.
    """
    assert a.experts is not None
    inner, stored = a.experts.moe_intermediate_size, LAYER + "mlp.experts.experts."
    local, grouped = LAYER + "mlp.experts.local_experts.{expert}.", LAYER + "mlp.experts."
    return (
        _norm(HF_LAYER + "post_attention_layernorm.weight", a.hidden_size, LAYER + "pre_mlp_layernorm.weight"),
        TensorRule(
            (HfTensor(HF_LAYER + "mlp.gate.weight", (a.experts.num_experts, a.hidden_size)),),
            (LAYER + "mlp.router.weight",),
            Replicated(),
        ),
        TensorRule(
            (
                HfTensor(HF_EXPERT + "gate_proj.weight", (inner, a.hidden_size)),
                HfTensor(HF_EXPERT + "up_proj.weight", (inner, a.hidden_size)),
            ),
            (local + "linear_fc1.weight", grouped + "linear_fc1.weight{expert}"),
            GateAndUp(),
            stored_as=stored + "linear_fc1.weight",
        ),
        TensorRule(
            (HfTensor(HF_EXPERT + "down_proj.weight", (a.hidden_size, inner)),),
            (local + "linear_fc2.weight", grouped + "linear_fc2.weight{expert}"),
            Split(1),
            stored_as=stored + "linear_fc2.weight",
        ),
    )


def _norm(hf_name: str, size: int, *megatron: str, stored_as: str = "") -> TensorRule:
    return TensorRule((HfTensor(hf_name, (size,)),), megatron, Replicated(), initial="ones", stored_as=stored_as)


def _query_key_value(a: Architecture, kind: str, inputs: Shape, initial: Initial) -> TensorRule:
    groups = a.num_key_value_heads
    heads = {"q": a.num_attention_heads, "k": groups, "v": groups}
    return TensorRule(
        tuple(
            HfTensor(HF_LAYER + f"self_attn.{short}_proj.{kind}", (count * a.head_dim, *inputs))
            for short, count in heads.items()
        ),
        (LAYER + f"self_attention.linear_qkv.{kind}",),
        GroupedQkv(groups, a.num_attention_heads // groups, a.head_dim),
        initial=initial,
    )


def layer_rules(a: Architecture) -> tuple[TensorRule, ...]:
    """The tensors of every layer, as the family's features say."""
    family = a.family
    return (
        attention_norm(a),
        query_key_value(a),
        *((query_key_value_bias(a),) if family.qkv_bias else ()),
        *(query_key_norms(a) if family.qk_layernorm else ()),
        attention_output(a),
        *(experts(a) if family.has_experts else feed_forward(a)),
    )


def weight_table(architecture: Architecture) -> WeightTable:
    """The two-way table of a model."""
    layer = layer_rules(architecture)
    return WeightTable(
        (embedding(architecture), *layer, final_norm(architecture), *head(architecture)),
        num_layers=architecture.num_hidden_layers,
        num_experts=architecture.experts.num_experts if architecture.experts else 0,
        # Checkpoints with tied embeddings may contain the head as well. If it differs from the embedding, Transformers
        # ignores the configuration and uses it, so this is refused here.
        copies={HF_HEAD: HF_EMBEDDING} if architecture.tie_word_embeddings else {},
    )


def value_model_table(architecture: Architecture) -> WeightTable:
    """The table of a critic: the same decoder with a value head instead of the output head."""
    untied = replace(architecture, tie_word_embeddings=False)
    table = weight_table(untied)
    trunk = [rule for rule in table.rules if rule not in head(untied)]
    return replace(table, rules=(*trunk, *value_head(architecture)), copies={})
