"""The two-way weight table HF <-> Megatron of a model of any supported family.

The same table is used for loading, random initialisation, weight sync to the engine, export, and conversion to and from
Megatron's distributed checkpoints. LoRA adapters have their own table (peft.py).

If a rule has two Megatron names, the first is that of local layers. The second is Transformer Engine's, for a norm that
it fuses into the following matrix, or for an expert in its grouped matrix products.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.weights.layouts import GateAndUp, GroupedQkv, Replicated, Shape, Split, TensorLayout, Vocabulary

HF_LAYER = "model.layers.{layer}."
HF_EXPERT = HF_LAYER + "mlp.experts.{expert}."
LAYER = "decoder.layers.{layer}."
EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_HEAD = "lm_head.weight"
Initial = Literal["normal", "uniform", "ones", "zeros"]


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the HF checkpoint."""

    name: str
    """Contains `{layer}` and `{expert}` for tensors that each layer or expert has."""
    shape: Shape


@dataclass(frozen=True)
class TensorRule:
    """One Megatron parameter (per layer, per expert) and the HF tensors it consists of."""

    hf: tuple[HfTensor, ...]
    megatron: tuple[str, ...]
    """Names of the parameter, with `{layer}` and `{expert}`: in local and in Transformer Engine layers, or of several
    parameters that hold the same tensor."""
    layout: TensorLayout
    initial: Initial = "normal"
    """Random initialisation of the parameter; see `load.fill_with_random_weights`."""
    stored_as: str = ""
    """Name in distributed checkpoints, if it differs from `megatron[0]`."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron[0]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron[0]

    @property
    def checkpoint_name(self) -> str:
        """Name in distributed checkpoints, where all layers and experts are stacked into one tensor."""
        return (self.stored_as or self.megatron[0]).replace("{layer}.", "")


@dataclass(frozen=True)
class WeightTable:
    """All rules of a model, in the order of the model's computation."""

    rules: tuple[TensorRule, ...]
    num_layers: int
    num_experts: int = 0
    """Experts per layer; 0 for a dense model."""
    copies: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Optional HF names in a checkpoint, mapped to the names of the tensors they must equal."""
    holds_adapters: bool = False
    """Whether the table is that of a model's LoRA adapters, without its other parameters; otherwise it has only the
    others."""

    def entries(self) -> Iterator["TableEntry"]:
        """All entries: rules before the layers, then layer by layer, then rules after the layers."""
        per_layer = [i for i, rule in enumerate(self.rules) if rule.per_layer]
        first, last = per_layer[0], per_layer[-1] + 1
        assert per_layer == list(range(first, last)), "rules of the layers must be adjacent"
        yield from (TableEntry(rule) for rule in self.rules[:first])
        for layer in range(self.num_layers):
            for rule in self.rules[first:last]:
                if rule.per_expert:
                    yield from (TableEntry(rule, layer, expert) for expert in range(self.num_experts))
                else:
                    yield TableEntry(rule, layer)
        yield from (TableEntry(rule) for rule in self.rules[last:])

    def hf_shapes(self) -> dict[str, Shape]:
        """Shape of every HF tensor by name."""
        return {tensor.name: tensor.shape for entry in self.entries() for tensor in entry.hf}


@dataclass(frozen=True)
class TableEntry:
    """A rule for one layer and expert, or a rule outside the layers."""

    rule: TensorRule
    layer: int | None = None
    """Index in the whole model, from 0."""
    expert: int | None = None
    """Index in the whole layer, from 0."""

    @property
    def hf(self) -> tuple[HfTensor, ...]:
        """The HF tensors with layer and expert filled in."""
        return tuple(
            HfTensor(tensor.name.format(layer=self.layer, expert=self.expert), tensor.shape) for tensor in self.rule.hf
        )


def embedding(a: Architecture) -> TensorRule:
    # With tied embeddings the last pipeline stage keeps a copy of the embedding under the head's name.
    return TensorRule(
        (HfTensor(HF_EMBEDDING, (a.vocab_size, a.hidden_size)),),
        (EMBEDDING, HEAD) if a.tie_word_embeddings else (EMBEDDING,),
        Vocabulary(a.vocab_size),
    )


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
    fused = LAYER + "self_attention.linear_qkv.layer_norm_weight"
    return _norm(
        HF_LAYER + "input_layernorm.weight", a.hidden_size, LAYER + "input_layernorm.weight", fused, stored_as=fused
    )


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
    """The tensors of every layer, according to the family's features."""
    family = a.family
    return (
        attention_norm(a),
        _query_key_value(a, "weight", (a.hidden_size,), "normal"),
        *((_query_key_value(a, "bias", (), "zeros"),) if family.qkv_bias else ()),
        *(query_key_norms(a) if family.qk_layernorm else ()),
        attention_output(a),
        *(experts(a) if family.has_experts else feed_forward(a)),
    )


def weight_table(architecture: Architecture) -> WeightTable:
    """The two-way table of a model."""
    final_norm = _norm("model.norm.weight", architecture.hidden_size, "decoder.final_layernorm.weight")
    return WeightTable(
        (embedding(architecture), *layer_rules(architecture), final_norm, *head(architecture)),
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
