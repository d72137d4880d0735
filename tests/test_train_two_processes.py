"""`dsrl train` over two processes, with all that concerns more than one: a mixture of experts, half of them on each,
with routing replay and a balancing loss; dynamic sampling, which every rank follows; a timeline of two ranks and two
engines.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from examples.tiny_dsrl.tokenizer import VOCAB_SIZE
from megatron_dsrl.model.routed_experts import decode_routed_experts
from megatron_dsrl.observability.records import read_starts
from megatron_dsrl.rollout.recording import read_batch, read_groups, rollout_file
from tests.support import recording_tracker
from tests.support.compare_runs import assert_same_tensors, checkpoint_tensors, records
from tests.support.tiny_run import dsrl, processes_left_behind, write_tiny_run
from tests.test_train import assert_traced

LAYERS, EXPERTS, EXPERTS_PER_TOKEN = 2, 8, 2
SETTINGS = [
    "parallel.expert_parallel_size=2",
    "rollout.routing_replay=true",
    "engine.check_weights=always",
    "model.router={load_balancing: global_aux_loss, load_balancing_coefficient: 0.001}",
    "rollout.dynamic_sampling={max_rounds: 6}",
    "rollout.step_timeout_seconds=120.0",
    "phases.0.filter=all",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of two steps."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            num_experts=EXPERTS,
            num_experts_per_tok=EXPERTS_PER_TOKEN,
            moe_intermediate_size=32,
            norm_topk_prob=True,
            initializer_range=0.1,
        )
    )
    config = write_tiny_run(tmp_path_factory.mktemp("tiny"), model)
    tracker = f"observability.trackers=[{{name: '{recording_tracker.PATH}', file: {config.parent / 'calls.jsonl'}}}]"
    result = dsrl("train", str(config), *SETTINGS, "evaluation.sets=[]", tracker, processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("http://tracker/run") == 1
    assert not processes_left_behind()
    return config.parent / "runs" / "tiny"


def test_one_record_says_what_produced_the_run_on_both_processes(run) -> None:
    (start,) = read_starts(run)
    assert start["world_size"] == 2 and start["layout"]["expert_parallel_size"] == 2 and len(start["hosts"]) == 1


def test_only_rank_0_has_trackers(run) -> None:
    calls = recording_tracker.calls(run.parent.parent / "calls.jsonl")
    assert [call["call"] for call in calls] == ["open", "log", "log", "finish"]
    assert [call["metrics"]["reward/mean"] for call in calls[1:3]] == [r["reward/mean"] for r in records(run)]
    assert calls[0]["config"]["rollout"]["routing_replay"] is True and calls[-1]["status"] == "finished"


def test_engine_and_trainer_agree_with_the_same_experts(run) -> None:
    first, second = records(run)
    assert (first["phase"], second["phase"]) == ("NSR-PreRL", "GRPO")
    assert first["policy/grad_norm"] > 0 and second["policy/grad_norm"] > 0
    # step 2 samples with weights that were pushed after step 1
    assert second["mismatch/max_log_prob_gap"] < 1e-4


def test_every_step_says_how_balanced_the_experts_were(run) -> None:
    for record in records(run):
        assert 1 < record["router/load_balancing_loss"] < EXPERTS / EXPERTS_PER_TOKEN
        assert "router/z_loss" not in record


@torch.no_grad()
def test_the_experts_are_those_that_transformers_chooses(run) -> None:
    """The samples of step 1 come from the weights that the run began with."""
    model = AutoModelForCausalLM.from_pretrained(run.parent.parent / "model").eval()
    same = total = 0
    for group in read_groups(rollout_file(run, 1)):
        for sample in group.samples:
            tokens = torch.tensor([[*group.prompt.token_ids, *sample.response_ids]])
            recorded = decode_routed_experts(sample.routed_experts, LAYERS, EXPERTS_PER_TOKEN)
            assert len(recorded) == tokens.shape[1] - 1
            logits = torch.stack(model(tokens, output_router_logits=True).router_logits, dim=1)[:-1]
            chosen = logits.topk(EXPERTS_PER_TOKEN).indices
            same += (recorded.long().sort().values == chosen.sort().values).all(-1).sum().item()
            total += chosen[..., 0].numel()
    assert same / total > 0.999, "only rounding may turn a choice"


def test_dynamic_sampling_trains_on_mixed_groups_only_and_every_rank_follows(run) -> None:
    sampled_in_all = 0
    for record in records(run):
        groups, others = read_batch(rollout_file(run, record["step"]))
        assert [each.rewards_differ for each in groups] == [True] * 8
        assert not any(each.rewards_differ for each in others)
        assert record["dynamic_sampling/sampled_groups"] == len(groups + others)
        for name in ("missing_groups", "surplus_groups", "aborted_groups"):
            assert record[f"dynamic_sampling/{name}"] == 0, name
        assert record["policy/kept_samples"] == 8 * 4
        sampled_in_all += len(groups + others)
    state = json.loads((run / "checkpoints" / "step_000002" / "state.json").read_text())
    assert state["run"]["sampler"]["position"] == sampled_in_all % 40


@pytest.mark.slow
def test_the_recorded_run_can_be_trained_on_again_bit_for_bit(run) -> None:
    """It starts no engines and ignores `dynamic_sampling`."""
    config = run.parent.parent / "config.yaml"
    replay = ["name=replayed", f"rollout.replay_from={run}", "evaluation.sets=[]"]
    result = dsrl("train", str(config), *SETTINGS, *replay, processes=2)
    assert result.returncode == 0, result.stderr
    replayed = run.parent / "replayed"
    assert_same_tensors(checkpoint_tensors(run, 2), checkpoint_tensors(replayed, 2))
    for step, (one, two) in enumerate(zip(records(run), records(replayed), strict=True), start=1):
        same = [name for name in one if name.split("/")[0] in ("policy", "mismatch", "router", "reward", "response")]
        assert {name: one[name] for name in same} == {name: two[name] for name in same}
        assert read_batch(rollout_file(run, step)) == read_batch(rollout_file(replayed, step))


def test_the_timeline_has_both_ranks_and_both_engines(run) -> None:
    assert_traced(run, ranks=2)
