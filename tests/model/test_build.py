"""One process: the model in Megatron is the model in Transformers, and a packed row is its sequences one by one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.build import build_model, build_trainable
from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel
from megatron_dsrl.weights.load import load_hf_weights
from megatron_dsrl.weights.table import weight_table
from tests.support.families import FAMILIES
from tests.support.packed import packed
from tests.support.tiny_model import LLAMA3, YARN, make_tiny_llama, make_tiny_qwen3

PARALLEL = ParallelConfig(collective_timeout_seconds=60)
LENGTHS = [13, 24, 11, 12, 1, 24]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    initialize_parallel(PARALLEL, seed=1)
    yield
    destroy_parallel()
    assert not dist.is_initialized()


def build(folder: Path, **model: str) -> torch.nn.Module:
    architecture = read_architecture(folder)
    chunks = build_model(architecture, ModelConfig(**({"path": str(folder), "dtype": "float32"} | model)), PARALLEL)
    load_hf_weights(chunks, weight_table(architecture), folder)
    return chunks[0]


def token_ids(*shape: int) -> Tensor:
    return torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path, family) -> None:
    reference = FAMILIES[family](tmp_path, vocab_size=101)
    model, rows = build(tmp_path), token_ids(3, 40)
    torch.testing.assert_close(model(rows, None, None), reference(rows).logits, rtol=0, atol=1e-5)

    row = token_ids(1, sum(LENGTHS))
    expected = torch.cat([reference(sequence).logits for sequence in row.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(model(row, None, None, packed_seq_params=packed(LENGTHS)), expected, rtol=0, atol=1e-5)


SCALED = {
    "YaRN": (make_tiny_qwen3, {**YARN, "rope_theta": 1e4, "beta_fast": 8.0, "beta_slow": 2.0}),
    "Llama 3": (make_tiny_llama, {**LLAMA3, "factor": 6.0, "low_freq_factor": 0.5, "high_freq_factor": 8.0}),
}


@pytest.mark.parametrize("scaling", SCALED)
def test_scaled_rope_equals_transformers_beyond_the_original_context(tmp_path, scaling) -> None:
    """Up to position 400 of a model pre-trained for 128 or 64, with unusual bounds between the frequencies; packed rows
    select their angles in another way than dense ones."""
    make, rope = SCALED[scaling]
    reference = make(tmp_path, tied=True, vocab_size=101, rope=rope)
    model, rows, lengths = build(tmp_path), token_ids(2, 400), [150, 300, 20]
    torch.testing.assert_close(model(rows, None, None), reference(rows).logits, rtol=0, atol=1e-5)
    row = token_ids(1, sum(lengths))
    expected = torch.cat([reference(sequence).logits for sequence in row.split(lengths, 1)], 1)
    torch.testing.assert_close(model(row, None, None, packed_seq_params=packed(lengths)), expected, rtol=0, atol=1e-5)

    plain_rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    plain = make(tmp_path / "plain", tied=True, vocab_size=101, rope=plain_rope)
    assert (plain(rows).logits - reference(rows).logits).abs().max() > 0.1  # the scaling matters to this model


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_of_a_packed_row_equal_transformers(tmp_path, recompute) -> None:
    """With and without recomputation; every token has another weight, so that none can stand in for another."""
    reference = make_tiny_qwen3(tmp_path, tied=False, vocab_size=101)
    model, row = build(tmp_path, recompute=recompute), token_ids(1, sum(LENGTHS))
    weights = torch.randn(sum(LENGTHS), 101, generator=torch.Generator().manual_seed(6))

    (model(row, None, None, packed_seq_params=packed(LENGTHS))[0] * weights).sum().backward()
    expected = torch.cat([reference(sequence).logits[0] for sequence in row.split(LENGTHS, 1)])
    (expected * weights).sum().backward()

    for ours, theirs in [
        (model.embedding.word_embeddings.weight, reference.model.embed_tokens.weight),
        (model.decoder.layers[0].self_attention.q_layernorm.weight, reference.model.layers[0].self_attn.q_norm.weight),
        (model.decoder.layers[0].mlp.linear_fc2.weight, reference.model.layers[0].mlp.down_proj.weight),
        (model.decoder.layers[2].self_attention.linear_proj.weight, reference.model.layers[2].self_attn.o_proj.weight),
    ]:
        error = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < 1e-5


def test_no_sequence_of_a_packed_row_sees_another(tmp_path) -> None:
    """The gradient of one sequence's logits by the others' hidden states is exactly zero, and by its own is not."""
    make_tiny_qwen3(tmp_path, tied=False, vocab_size=101)
    model, row = build(tmp_path), token_ids(1, sum(LENGTHS))
    hidden: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        output.retain_grad()
        hidden.append(output)  # [t, 1, h]

    model.embedding.register_forward_hook(keep)
    logits = model(row, None, None, packed_seq_params=packed(LENGTHS))
    start, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    logits[:, start:end].square().sum().backward()
    reached = hidden[0].grad.flatten(1).abs().sum(1) > 0
    assert reached.nonzero().flatten().tolist() == list(range(start, end))


def test_bfloat16_stays_close_to_a_bfloat16_transformers_model(tmp_path) -> None:
    reference = make_tiny_qwen3(tmp_path, tied=True, vocab_size=101, dtype=torch.bfloat16)
    rows = token_ids(2, 30)
    logits = build(tmp_path, dtype="bfloat16")(rows, None, None)
    assert next(build(tmp_path, dtype="bfloat16").parameters()).dtype == torch.bfloat16
    # Norms differ in where they round; logits are of size 1 to 4 and bfloat16 has 8 bits.
    torch.testing.assert_close(logits.float(), reference(rows).logits.float(), rtol=0, atol=0.1)


def test_trainable_model_accumulates_in_float32(tmp_path) -> None:
    make_tiny_qwen3(tmp_path, tied=True, vocab_size=101)
    chunks = build_trainable([build(tmp_path, dtype="bfloat16")], PARALLEL)
    assert all(parameter.main_grad.dtype == torch.float32 for parameter in chunks[0].parameters())


def test_transformer_engine_is_refused_where_it_is_absent(tmp_path) -> None:
    make_tiny_qwen3(tmp_path, tied=True, vocab_size=101)
    with pytest.raises(UserError, match="model.layer_spec: transformer_engine needs the transformer-engine"):
        build(tmp_path, layer_spec="transformer_engine")
