"""`dsrl train` as a user runs it: the real Megatron actor, the real SGLang engine, both phases."""

import hashlib
import json
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron_dsrl.common.checksum import fingerprint
from megatron_dsrl.common.numbers import counted
from megatron_dsrl.evaluation.evaluate import hf_folder
from megatron_dsrl.evaluation.find_model import find_model
from megatron_dsrl.observability.records import read_starts
from megatron_dsrl.report.timeline import Windows, read_timelines
from megatron_dsrl.rollout.recording import read_batch, read_groups, rollout_file
from megatron_dsrl.rollout.unfinished import CarryOver
from tests.support.compare_runs import assert_same_tensors, checkpoint_tensors, records
from tests.support.tiny_run import dsrl, processes_left_behind, write_tiny_run

OFFLOAD = "actor.offload={gradients: true, optimizer: true, parameters: true}"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(config) -> Path:
    """One finished run of two steps, whose trainer is in host memory while the engine samples."""
    result = dsrl("train", str(config), OFFLOAD)
    assert result.returncode == 0, result.stderr
    assert "norm megatron_dsrl.RMSNorm, optimizer torch.AdamW" in result.stdout, "what computes without a GPU"
    return config.parent / "runs" / "tiny"


def test_a_run_goes_through_both_phases_and_leaves_everything_behind(run) -> None:
    first, second = records(run)
    assert (first["phase"], second["phase"]) == ("NSR-PreRL", "GRPO")
    assert (first["space"], second["space"]) == ("pre_train", "post_train")
    assert first["policy/kept_samples"] < 32 and second["policy/kept_samples"] == 32
    assert first["policy/grad_norm"] > 0 and second["policy/grad_norm"] > 0
    assert [r["step"] for r in records(run, "evaluation.jsonl")] == [0, 2]
    assert [len(r["responses"]) for r in records(run, "evaluation_responses.jsonl")] == [8, 8]
    assert list((run / "tensorboard").glob("events.*"))
    exported = AutoModelForCausalLM.from_pretrained(run / "hf" / "step_000002")
    assert exported.config.vocab_size == 128
    card = ModelCard.load(run / "hf" / "step_000002" / "README.md")
    accuracy = records(run, "evaluation.jsonl")[-1]["accuracy"]
    assert [result.metric_value for result in card.data.eval_results] == [round(100 * accuracy, 2)]
    assert "| NSR-PreRL | 1 |" in card.text and "| GRPO | 2 |" in card.text


def test_a_run_says_what_produced_it(config, run) -> None:
    (start,) = read_starts(run)
    assert (start["command"], start["after_step"], start["world_size"]) == ("train", 0, 1)
    assert start["command_line"][-3:] == ["train", str(config), OFFLOAD]
    assert start["code"]["commit"] or start["code"]["reason"]
    assert start["layout"]["tensor_parallel_size"] == 1
    assert start["model"]["fingerprint"] == fingerprint(config.parent / "model")
    prompts = hashlib.sha256((config.parent / "prompts.jsonl").read_bytes()).hexdigest()
    assert start["data"]["files"]["prompts.jsonl"]["sha256"] == prompts and start["data"]["prompts"] == 40
    assert start["evaluation_sets"]["held-out"]["prompts"] == 8
    times = [record["time"] for file in ("metrics.jsonl", "evaluation.jsonl") for record in records(run, file)]
    assert all(start["time"] < one < time.time() for one in times)


def test_the_engine_log_of_a_healthy_run_shows_no_traceback_and_no_warning_of_python(run) -> None:
    log = (run / "engines" / "engine_0.log").read_text()
    assert log and not re.search(r"Traceback|freeze_gc|leaked|Warning:", log), log


def test_every_sample_is_on_disk_with_the_weights_that_it_came_from(run) -> None:
    for step in (1, 2):
        groups = read_groups(rollout_file(run, step))
        assert len(groups) == 8
        for group in groups:
            assert len(group.samples) == 4
            for sample in group.samples:
                assert sample.weight_version == step
                assert len(sample.log_probs) == len(sample.response_ids) > 0
                assert sample.reward == float(len(sample.text) % 2 == 0)


def test_every_switch_of_device_memory_is_recorded(run) -> None:
    first, second = records(run)
    parameters = sum(tensor.numel() for tensor in load_file(run / "hf" / "step_000002" / "model.safetensors").values())
    all_of_it = 16 * parameters / 2**30  # in float32 4 bytes for weights, 4 for gradients, 8 for Adam's moments
    for switch in ("engine_sleep", "onload", "load_weights", "offload", "engine_wake"):
        assert first[f"memory/{switch}_seconds"] > 0
        assert first[f"memory/{switch}_peak_gib"] >= first[f"memory/{switch}_gib"] > 0
    assert first["memory/onload_moved_gib"] == pytest.approx(all_of_it, rel=0.02)
    assert first["memory/offload_moved_gib"] == pytest.approx(2 * all_of_it, rel=0.02)  # before and after step 1
    assert second["memory/onload_moved_gib"] == first["memory/onload_moved_gib"]
    assert "memory/offload_seconds" not in second  # a checkpoint and an export follow the last step


def test_the_timeline_has_every_part_of_every_step_and_every_call(run) -> None:
    trace = assert_traced(run, ranks=1)
    switches = {event["name"] for event in trace if event.get("cat") == "part" and event["args"] == {}}
    assert {"engine_sleep", "onload", "offload", "engine_wake", "export", "save_checkpoint", "evaluate"} <= switches


def assert_traced(run: Path, ranks: int) -> list[dict]:
    """`dsrl trace` on a run of two steps: the events of its trace."""
    result = dsrl("trace", str(run))
    assert result.returncode == 0, result.stderr
    assert f"2 steps on {counted(ranks, 'rank')}" in result.stdout and "busy" in result.stdout
    trace = json.loads((run / "trace" / "trace.json").read_text())["traceEvents"]
    slices = [event for event in trace if event["ph"] == "X"]
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in slices)

    def inside(outer: dict, category: str) -> list[dict]:
        starts = range(outer["ts"], outer["ts"] + outer["dur"] + 1)
        return [one for one in slices if one["cat"] == category and one["ts"] in starts]

    recorded = {record["step"]: record for record in records(run)}
    for rank in range(ranks):
        for step in (1, 2):
            (whole,) = [one for one in slices if one["pid"] == rank and one["args"].get("step") == step]
            parts = [one for one in inside(whole, "part") if one["pid"] == rank]
            for part in ("generate", "train", "push_weights"):
                microseconds = sum(one["dur"] for one in parts if one["name"] == part)
                assert microseconds > 0
                if rank == 0:
                    assert microseconds / 1e6 == pytest.approx(recorded[step][f"seconds/{part}"], abs=0.3)
    first = read_timelines(run)[0]
    generate = [span.when for span in first.spans if span.path == ("generate",)]
    for step in first.steps:
        samplings = Windows([when for when in generate if step.when.start <= when.start < step.when.end])
        calls = [call for call in first.calls if samplings.hold(call.when.start)]
        samples = [sample for group in read_groups(rollout_file(run, step.step)) for sample in group.samples]
        assert sum(call.tokens for call in calls) == sum(len(s.response_ids) for s in samples)
        assert all(samplings.hold(call.when.end) and call.outcome == "done" for call in calls)
        assert len({call.engine for call in calls}) == ranks  # one engine each
    in_flight = {event["pid"]: event["args"]["requests"] for event in trace if event["ph"] == "C"}
    assert list(in_flight.values()) == [0] * ranks  # in the end, for every engine
    assert {event["pid"] for event in slices if event["cat"] == "call"} == in_flight.keys()
    return trace


def test_samples_are_shown_with_their_token_log_probs_in_both_spaces(config, run) -> None:
    prompt = read_groups(rollout_file(run, 1))[0].prompt
    result = dsrl("samples", str(run), "--step", "1", "--prompt", str(prompt.index), "--log-probs")
    assert result.returncode == 0, result.stderr
    assert "the run's initial model, which sampled them" in result.stdout and "\x1b" not in result.stdout
    sample = read_groups(rollout_file(run, 1))[0].samples[0]
    lines = result.stdout.splitlines()
    table = next(number for number, line in enumerate(lines, start=1) if line.startswith("token  "))
    rows = [[float(cell) for cell in line.split()[-4:]] for line in lines[table : table + len(sample.response_ids)]]
    model = AutoModelForCausalLM.from_pretrained(config.parent / "model")
    bos = AutoTokenizer.from_pretrained(config.parent / "model").convert_tokens_to_ids("<|im_start|>")
    given, alone = (
        log_probs_of(model, (*context, *sample.response_ids))[len(context) - 1 :]
        for context in (prompt.token_ids, (bos,))
    )
    for row, *expected in zip(rows, sample.log_probs, given, alone, strict=True):
        assert row == pytest.approx([*expected, expected[1] - expected[2]], abs=1.1e-3)  # three decimals are printed


@torch.no_grad()
def log_probs_of(model: PreTrainedModel, token_ids: tuple[int, ...]) -> list[float]:
    """Log-prob of every token but the first, given those before it."""
    logits = model(torch.tensor([token_ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()


def test_engine_and_trainer_agree_on_log_probs_after_a_weight_push(run) -> None:
    # step 2 samples with weights that were pushed after step 1, and the trainer scores them with its own
    assert records(run)[1]["mismatch/max_log_prob_gap"] < 1e-4


def test_the_sampled_conditional_entropy_estimates_that_of_the_trainer(run) -> None:
    step = records(run)[1]  # trains in the post-train space on every sample, so both are means over the same tokens
    samples = [sample for group in read_groups(rollout_file(run, 2)) for sample in group.samples]
    log_probs = torch.tensor([log_prob for sample in samples for log_prob in sample.log_probs])
    assert step["response/conditional_entropy"] == pytest.approx(-log_probs.double().mean().item())
    standard_error = log_probs.std().item() / len(log_probs) ** 0.5
    assert 0 < step["policy/entropy"] == pytest.approx(step["response/conditional_entropy"], abs=4 * standard_error)


@pytest.mark.slow
def test_partial_rollouts_carry_groups_over_steps_and_over_an_interruption(config) -> None:
    """Every step begins with what was left, and takes mixed groups only; no prompt is lost or trained on twice. Each of
    40 is drawn once. On what it recorded, the run is repeated bit for bit."""
    partial = ["rollout.partial_rollouts={oversampling: 2.0}", "rollout.dynamic_sampling={max_rounds: 4}"]
    partial += ["rollout.prompts_per_step=4", "evaluation.sets=[]", "checkpoint.save_every_steps=1"]
    for steps in (2, 3):
        result = dsrl("train", str(config), "name=partial", *partial, f"steps={steps}")
        assert result.returncode == 0, result.stderr
    run = config.parent / "runs" / "partial"
    steps = records(run)
    for before, after in zip(steps, steps[1:]):
        assert after["partial_rollouts/continued_groups"] == before["partial_rollouts/left_groups"]
    assert steps[0]["partial_rollouts/left_groups"] == 4
    recorded = [read_batch(rollout_file(run, step)) for step in (1, 2, 3)]
    trained = [group.prompt.index for groups, _ in recorded for group in groups]
    rejected = [group.prompt.index for _, others in recorded for group in others]
    left = CarryOver.read_from(run / "checkpoints" / "step_000003" / "rollout")
    carried = [group.prompt.index for group in (*left.finished, *left.unfinished)]
    assert len(trained) == len(set(trained)) == 12
    assert not set(trained) & {*carried, *rejected}
    state = json.loads((run / "checkpoints" / "step_000003" / "state.json").read_text())
    assert state["run"]["sampler"]["position"] == len(trained) + len(rejected) + len(carried)

    result = dsrl("train", str(config), "name=again", *partial, "steps=3", f"rollout.replay_from={run}")
    assert result.returncode == 0, result.stderr
    one, other = (checkpoint_tensors(run.parent / name, 3) for name in ("partial", "again"))
    assert_same_tensors(one, other)  # also across the interruption


@pytest.mark.slow
def test_both_halves_alone(config) -> None:
    """Samples without a trainer, and a training on them without engines."""
    sampled = dsrl("rollout", str(config), "name=sampled")
    assert sampled.returncode == 0, sampled.stderr
    run = config.parent / "runs" / "sampled"
    assert {s.weight_version for step in (1, 2) for g in read_groups(rollout_file(run, step)) for s in g.samples} == {0}
    assert not (run / "checkpoints").exists()
    assert [start["command"] for start in read_starts(run)] == ["rollout"]

    trained = dsrl("train", str(config), "name=trained", f"rollout.replay_from={run}", "evaluation.sets=[]")
    assert trained.returncode == 0, trained.stderr
    first, second = records(config.parent / "runs" / "trained")
    assert first["response/older_token_fraction"] == second["response/older_token_fraction"] == 1.0
    assert second["policy/grad_norm"] > 0
    again = dsrl("rollout", str(config), "name=sampled")
    assert again.returncode == 0 and "step 1/2" not in again.stdout, "what is there is not sampled again"


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "parallel.tensor_parallel_size=2",
        "parallel.pipeline_parallel_size=2",
        "parallel={context_parallel_size: 2, distributed_optimizer: true}",
    ],
)
def test_two_processes_give_the_same_steps_as_one(config, run, layout) -> None:
    name = layout.split("=")[0]
    result = dsrl(
        "train", str(config), f"name={name}", layout, f"rollout.replay_from={run}", "evaluation.sets=[]", processes=2
    )
    assert result.returncode == 0, result.stderr
    for one, two in zip(records(run), records(run.parent / name), strict=True):
        for metric in ("policy/loss", "policy/grad_norm"):
            assert two[metric] == pytest.approx(one[metric], rel=1e-5), (one["phase"], metric)
    assert_evaluated_alike(run.parent / name)


def test_the_checkpoint_is_evaluated_as_the_policy_that_was_exported(run) -> None:
    assert_evaluated_alike(run)


def assert_evaluated_alike(run: Path) -> None:
    """`dsrl eval` takes export and checkpoint for the same model."""
    exported = find_model(str(run))
    assert exported.folder == run / "hf" / "step_000002"
    checkpoint = find_model(str(run / "checkpoints" / "step_000002"))
    assert fingerprint(hf_folder(checkpoint, run / "evaluation")) == fingerprint(exported.folder)


def test_an_analysis_and_the_report_of_a_run(run) -> None:
    """Gradients under the run's own model, as the command computes them; the report has them."""
    analysed = dsrl("analyse", "gradients", str(run), "--responses", "3")
    assert analysed.returncode == 0, analysed.stderr
    responses = records(run / "analysis", "gradients.jsonl")
    assert [response["step"] for response in responses] == [1, 1, 1]  # sampled by the model that the run began with
    assert all(-1 <= response["cosine"] <= 1 and response["grad_norm"] > 0 for response in responses)

    result = dsrl("report", str(run))
    assert result.returncode == 0, result.stderr
    page = (run / "report.html").read_text()
    assert "NSR-PreRL" in page and "Gradients of log P(y) and log P(y|x)" in page
    assert "Log-prob gap by the token" in page and "engines/engine_0.log" in page


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=absent"], "absent"),
        (["data.source=absent.jsonl"], "absent.jsonl"),
        (["data.answer_field=solution"], "answer_field"),
        (["rollout.temprature=1"], "temperature"),
        (["reward.function=absent"], "reward.function"),
    ],
    ids=["no model", "no data", "no answers", "unknown key", "unknown reward"],
)
def test_bad_input_ends_in_one_message_and_leaves_no_process(config, overrides, message) -> None:
    result = dsrl("train", str(config), "name=bad", *overrides)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.startswith("dsrl: ")
    assert "Traceback" not in result.stderr
    assert processes_left_behind() == []


def test_an_engine_that_is_late_again_and_again_is_not_a_mistake_of_the_user(config) -> None:
    """A job may try once more, perhaps on another node; the message is one, and nothing is left running."""
    late = ["engine.startup_timeout_seconds=0.5", "engine.max_restarts=1"]
    result = dsrl("train", str(config), "name=slow", *late)
    assert result.returncode == 1
    assert "after engine.max_restarts = 1 restarts: the SGLang server at" in result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("Last lines of") <= 3
    assert processes_left_behind() == []


@pytest.mark.slow
def test_an_empty_data_set_a_wrong_tokenizer_and_a_taken_port_end_in_one_message(config, tmp_path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    wrong = tmp_path / "wrong_tokenizer"
    shutil.copytree(config.parent / "model", wrong)
    tokenizer = json.loads((wrong / "tokenizer.json").read_text())
    (wrong / "tokenizer.json").write_text(json.dumps(tokenizer).replace("<|im_start|>", "<|start|>"))
    (wrong / "tokenizer_config.json").write_text("{}")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        for override, message in (
            (f"data.source={empty}", "empty.jsonl"),
            (f"model.path={wrong}", "<|im_start|>"),
            (f"engine.port={port}", f"port {port}"),
        ):
            result = dsrl("train", str(config), "name=bad", override)
            assert result.returncode == 2, override
            assert message in result.stderr and result.stderr.startswith("dsrl: "), result.stderr
            assert "Traceback" not in result.stderr
    assert processes_left_behind() == []
