"""The weight table of a dense Qwen3."""

from megatron_dsrl.model.architecture import Qwen3Architecture
from megatron_dsrl.weights.layouts import GateAndUp, GroupedQkv, Replicated, Split, Vocabulary
from megatron_dsrl.weights.table import HfTensor, TensorRule, WeightTable

HF_LAYER = "model.layers.{layer}."
LAYER = "decoder.layers.{layer}."


def qwen3_table(architecture: Qwen3Architecture) -> WeightTable:
    """The two-way table. Where two Megatron names stand, the first is the local layers', the second the name under
    which Transformer Engine keeps the norm that it fuses into the following matrix."""
    a = architecture
    hidden, feed_forward, vocabulary = a.hidden_size, a.intermediate_size, a.vocab_size
    query_size, key_value_size = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    groups = a.num_key_value_heads
    qkv = GroupedQkv(groups, a.num_attention_heads // groups, a.head_dim)

    embedding = HfTensor("model.embed_tokens.weight", (vocabulary, hidden))
    head = HfTensor("lm_head.weight", (vocabulary, hidden))
    embedding_name, head_name = "embedding.word_embeddings.weight", "output_layer.weight"
    tied = a.tie_word_embeddings

    rules = [
        # With tied embeddings the last pipeline stage keeps a copy of the embedding under the head's name.
        TensorRule((embedding,), (embedding_name, head_name) if tied else (embedding_name,), Vocabulary(vocabulary)),
        TensorRule(
            (HfTensor(HF_LAYER + "input_layernorm.weight", (hidden,)),),
            (LAYER + "input_layernorm.weight", LAYER + "self_attention.linear_qkv.layer_norm_weight"),
            Replicated(),
            initial="ones",
        ),
        TensorRule(
            (
                HfTensor(HF_LAYER + "self_attn.q_proj.weight", (query_size, hidden)),
                HfTensor(HF_LAYER + "self_attn.k_proj.weight", (key_value_size, hidden)),
                HfTensor(HF_LAYER + "self_attn.v_proj.weight", (key_value_size, hidden)),
            ),
            (LAYER + "self_attention.linear_qkv.weight",),
            qkv,
        ),
        TensorRule(
            (HfTensor(HF_LAYER + "self_attn.q_norm.weight", (a.head_dim,)),),
            (LAYER + "self_attention.q_layernorm.weight",),
            Replicated(),
            initial="ones",
        ),
        TensorRule(
            (HfTensor(HF_LAYER + "self_attn.k_norm.weight", (a.head_dim,)),),
            (LAYER + "self_attention.k_layernorm.weight",),
            Replicated(),
            initial="ones",
        ),
        TensorRule(
            (HfTensor(HF_LAYER + "self_attn.o_proj.weight", (hidden, query_size)),),
            (LAYER + "self_attention.linear_proj.weight",),
            Split(1),
        ),
        TensorRule(
            (HfTensor(HF_LAYER + "post_attention_layernorm.weight", (hidden,)),),
            (LAYER + "pre_mlp_layernorm.weight", LAYER + "mlp.linear_fc1.layer_norm_weight"),
            Replicated(),
            initial="ones",
        ),
        TensorRule(
            (
                HfTensor(HF_LAYER + "mlp.gate_proj.weight", (feed_forward, hidden)),
                HfTensor(HF_LAYER + "mlp.up_proj.weight", (feed_forward, hidden)),
            ),
            (LAYER + "mlp.linear_fc1.weight",),
            GateAndUp(),
        ),
        TensorRule(
            (HfTensor(HF_LAYER + "mlp.down_proj.weight", (hidden, feed_forward)),),
            (LAYER + "mlp.linear_fc2.weight",),
            Split(1),
        ),
        TensorRule(
            (HfTensor("model.norm.weight", (hidden,)),), ("decoder.final_layernorm.weight",), Replicated(), "ones"
        ),
    ]
    if not tied:
        rules.append(TensorRule((head,), (head_name,), Vocabulary(vocabulary)))
    # Checkpoints with tied embeddings may hold the head a second time; Transformers does not read it either.
    return WeightTable(tuple(rules), a.num_hidden_layers, ignored=(head.name,) if tied else ())
