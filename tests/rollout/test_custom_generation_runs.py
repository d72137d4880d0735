"""A run with custom generation: with dynamic sampling, interrupted, and replayed."""

from pathlib import Path

import pytest

from megatron_dsrl.rollout.recording import read_batch, rollout_file
from megatron_dsrl.rollout.sample import Sample
from tests.support.compare_runs import assert_same_tensors, checkpoint_tensors, records
from tests.support.tiny_run import dsrl, write_tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

GENERATE = (
    "rollout.generate=tests.support.generation:take_turns",
    "rollout.generate_options={turn_tokens: 5}",
    "evaluation.sets=[]",
)


def train(config: Path, name: str, *options: str) -> Path:
    result = dsrl("train", str(config), f"name={name}", *GENERATE, *options, timeout_seconds=400)
    assert result.returncode == 0, result.stderr
    return config.parent / "runs" / name


def check_turns(sample: Sample) -> None:
    """Turns of at most 5 tokens with `12` between them, a reward of 0.25 after each."""
    scored = sample.scored or (True,) * len(sample.response_ids)
    turns = "".join("m" if own else "." for own in scored).split("..")
    assert all(0 < len(turn) <= 5 and set(turn) == {"m"} for turn in turns), turns
    assert len(sample.turn_rewards) == len(turns)
    assert [value for _, value in sample.turn_rewards] == [0.25] * len(turns)
    assert sample.reward - 0.25 * len(turns) in (0.0, 1.0)  # the verifier's


def test_an_interrupted_run_with_dynamic_sampling_is_repeated_from_its_recordings(tmp_path) -> None:
    """Bit for bit: the recordings have what is scored, and the rewards with those of the turns."""
    config = write_tiny_run(tmp_path)
    options = [
        "rollout.dynamic_sampling={max_rounds: 4}",
        "rollout.prompts_per_step=4",
        "checkpoint.save_every_steps=1",
    ]
    for steps in (2, 3):
        run = train(config, "sampled", *options, f"steps={steps}")

    batches = [read_batch(rollout_file(run, step))[0] for step in (1, 2, 3)]
    samples = [sample for batch in batches for group in batch for sample in group.samples]
    for sample in samples:
        check_turns(sample)
    assert any(sample.scored for sample in samples)
    trained = [group.prompt.index for batch in batches for group in batch]
    assert len(set(trained)) == len(trained) == 12
    for step in records(run):
        assert step["reward/recorded_mean"] > 0.25 and step["response/inserted_tokens"] > 0
        assert step.get("mismatch/max_log_prob_gap", 0.0) < 1e-4  # step 1 trains in the pre-train space

    replayed = train(config, "replayed", *options, "steps=3", f"rollout.replay_from={run}")
    assert_same_tensors(checkpoint_tensors(run, 3), checkpoint_tensors(replayed, 3))
