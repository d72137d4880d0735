"""The comparison of what was sent with what a real engine holds."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.address import EngineAddress
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.engines.tensor_layout import EngineLayout
from megatron_dsrl.rollout.engines.weight_check import SentWeights, WeightCheck, check_weights
from megatron_dsrl.rollout.engines.weight_push import push_weights
from tests.support.engine import tiny_run_config

TIMEOUT_SECONDS = 60.0


def buckets_of_three(weights: dict[str, torch.Tensor]) -> Iterator[Bucket]:
    """Cut across fused tensors. The memory of a bucket is overwritten when the next one is taken."""
    names = sorted(weights)
    for start in range(0, len(names), 3):
        bucket = [(name, weights[name].clone()) for name in names[start : start + 3]]
        yield bucket
        for _, tensor in bucket:
            tensor.zero_()


def push_and_check(
    rollout: EngineRollout, folder: Path, buckets: Iterator[Bucket], pushed=lambda bucket: bucket
) -> str | None:
    """Push what `pushed` returns for every bucket; returns what `check_weights` reports, given the buckets
    themselves."""
    (engine,) = rollout.engine_addresses
    sent = SentWeights(EngineLayout(read_architecture(folder), rank=0, size=1))
    changed = (pushed(bucket) for bucket in sent.watch(buckets))
    assert push_weights(changed, rollout.weight_version, engine, group=None, timeout_seconds=TIMEOUT_SECONDS) is None
    return check_weights(sent, engine, group=None, timeout_seconds=TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def weights(tiny_model_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_model_folder / "model.safetensors")


def test_an_engine_with_the_sent_weights_passes(engine_rollout, tiny_model_folder, weights) -> None:
    assert push_and_check(engine_rollout, tiny_model_folder, buckets_of_three(weights)) is None


def test_tensors_that_arrive_changed_are_named(engine_rollout, tiny_model_folder, weights) -> None:
    def spoil(bucket: Bucket) -> Bucket:
        """The smallest change of a single number in one tensor, and another one left out."""
        spoiled = []
        for name, tensor in bucket:
            if name == "model.layers.2.self_attn.k_proj.weight":
                tensor = tensor.clone()
                tensor[3, 5] = torch.nextafter(tensor[3, 5], torch.tensor(torch.inf))
            if name != "model.layers.1.mlp.down_proj.weight":
                spoiled.append((name, tensor))
        return spoiled

    changed = {name: tensor + 1 for name, tensor in weights.items()}  # what is left out differs from before
    problem = push_and_check(engine_rollout, tiny_model_folder, buckets_of_three(changed), spoil)

    assert problem.splitlines() == [
        "engine rank 0: model.layers.1.mlp.down_proj.weight differs",
        "engine rank 0: model.layers.2.self_attn.qkv_proj.weight (model.layers.2.self_attn.k_proj.weight, "
        "model.layers.2.self_attn.q_proj.weight, model.layers.2.self_attn.v_proj.weight) differs",
    ]


def test_tensors_that_were_not_sent_are_named(engine_rollout, tiny_model_folder, weights) -> None:
    incomplete = {name: tensor for name, tensor in weights.items() if "layers.0.mlp.up_proj" not in name}

    problem = push_and_check(engine_rollout, tiny_model_folder, buckets_of_three(incomplete))

    assert problem == ("engine rank 0: model.layers.0.mlp.gate_up_proj.weight of the engine was not sent completely")


def test_tensors_that_the_engine_does_not_have_are_named(engine_rollout, tiny_model_folder, weights) -> None:
    surplus = weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(128), "model.norm.bias": torch.zeros(64)}

    problem = push_and_check(engine_rollout, tiny_model_folder, buckets_of_three(surplus))

    assert problem.splitlines() == [
        "engine rank 0: model.layers.0.self_attn.qkv_proj.bias (model.layers.0.self_attn.q_proj.bias) is not in the "
        "engine",
        "engine rank 0: model.norm.bias is not in the engine",
    ]


def test_an_engine_that_is_gone_is_an_error_of_its_own(tiny_model_folder) -> None:
    sent = SentWeights(EngineLayout(read_architecture(tiny_model_folder), rank=0, size=1))

    with pytest.raises(EngineError, match="is gone"):
        check_weights(sent, EngineAddress("http://127.0.0.1:9"), group=None, timeout_seconds=5.0)


def test_the_first_push_of_a_run_is_compared_and_again_that_to_a_new_engine(
    engine_rollout, tiny_model_folder, weights
) -> None:
    (engine,) = engine_rollout.engine_addresses
    check = WeightCheck(tiny_run_config(tiny_model_folder), group=None)
    incomplete = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}

    def push(weights: dict[str, torch.Tensor]) -> str | None:
        buckets = check.watch(buckets_of_three(weights))
        assert push_weights(buckets, engine_rollout.weight_version, engine, None, TIMEOUT_SECONDS) is None
        return check.mismatch(engine)

    assert push(weights) is None
    assert push(incomplete) is None, "a second push is not compared"
    check.repeat()
    assert re.search("(?s)model.norm.weight of the engine.*engine.check_weights to never", push(incomplete))
    assert push(incomplete) is not None, "until a push has arrived in full"
    assert push(weights) is None and push(incomplete) is None


def test_neighbouring_ranks_share_a_key_value_head_where_there_are_more_ranks(tiny_model_folder) -> None:
    architecture = read_architecture(tiny_model_folder)  # two key-value heads of dimension 32
    keys = torch.arange(64)

    shards = [EngineLayout(architecture, rank, 4).shard("layers.0.self_attn.k_proj.bias", keys) for rank in range(4)]

    assert [shard[0].item() for shard in shards] == [0, 0, 32, 32] and {len(shard) for shard in shards} == {32}


def test_inner_sizes_are_padded_with_zeros_to_whole_blocks_on_every_rank(tiny_model_folder) -> None:
    layouts = [EngineLayout(read_architecture(tiny_model_folder), rank, 2, feed_forward_multiple=32) for rank in (0, 1)]
    up, down = torch.ones(48, 8), torch.ones(8, 48)  # 48 becomes 64: 32 on each rank

    rows = [layout.shard("layers.0.mlp.experts.3.up_proj.weight", up) for layout in layouts]
    columns = [layout.shard("layers.0.mlp.down_proj.weight", down) for layout in layouts]

    assert [tuple(part.shape) for part in rows + columns] == [(32, 8), (32, 8), (8, 32), (8, 32)]
    assert torch.equal(torch.cat(rows)[:48], up) and not torch.cat(rows)[48:].any()
    assert torch.equal(torch.cat(columns, dim=1)[:, :48], down) and not torch.cat(columns, dim=1)[:, 48:].any()
