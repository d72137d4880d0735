"""A run folder as a real run leaves it behind, written through the public tracker and rollout writer."""

import math
import random
from pathlib import Path

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.observability.records import PROVENANCE_FILE, Record, record_line
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.rollout.recording import rollout_file, write_groups
from megatron_dsrl.rollout.sample import Sample, SampleGroup, count_tokens
from megatron_dsrl.run.rollout_metrics import rollout_metrics

CONTROL_CHARACTERS = "\x00\x1b\u202e"
HOSTILE_TEXT = (
    "</pre><script>document.title='owned'</script><img src=x onerror=alert(1)> \\boxed{7} & \"quoted\""
    + CONTROL_CHARACTERS
)

CONFIG = """\
name: {name}
output_dir: runs
seed: 1
steps: {steps}
model:
  path: models/qwen3-tiny
  dtype: float32
parallel:
  tensor_parallel_size: 2
  pipeline_parallel_size: 1
engine:
  tensor_parallel_size: 1
data:
  source: openai/gsm8k
  subset: main
  system_prompt: null
reward:
  function: boxed
rollout:
  max_response_tokens: 64
  prompts_per_step: 8
  samples_per_prompt: 4
optimizer:
  learning_rate: {learning_rate}
phases:
- name: nsr-prerl
  until_step: {warmup}
  space: {{name: pre_train, bos: im_start}}
  advantage: {{name: group_mean}}
  filter: {{name: negative}}
  loss: {{name: dual_clip}}
  coefficient: 0.01
- name: grpo
  space: {{name: post_train}}
  advantage: {{name: group_standardised}}
  filter: {{name: all}}
  loss: {{name: dual_clip}}
  coefficient: 1.0
"""


def make_sample(reward: float, tokens: int = 3, text: str = "so \\boxed{1}", **changes: object) -> Sample:
    """A sample with the given reward and length; other fields by name."""
    fields = {
        "response_ids": tuple(range(tokens)),
        "log_probs": (-0.5,) * tokens,
        "text": text,
        "finish_reason": "stop",
        "weight_version": 1,
        "reward": reward,
    }
    return Sample(**(fields | changes))


def make_group(rewards: list[float], index: int = 0, **changes: object) -> SampleGroup:
    """One prompt with a sample per reward."""
    text = f"<|im_start|>user\nWhat is {index} + {index}?<|im_end|>\n<|im_start|>assistant\n"
    prompt = Prompt(index=index, text=text, token_ids=tuple(range(20)), answer=str(2 * index))
    return SampleGroup(prompt=prompt, samples=tuple(make_sample(reward, **changes) for reward in rewards))


def sampled_groups(random_source: random.Random, accuracy: float, step: int) -> list[SampleGroup]:
    """Eight prompts of different difficulty with four samples each; the very first response is hostile."""
    groups = []
    for index in range(8):
        prompt = make_group([], index).prompt
        chance = min(1.0, max(0.0, accuracy + random_source.uniform(-0.5, 0.5)))
        samples = []
        for number in range(4):
            right = random_source.random() < chance
            cut = random_source.random() < 0.1
            answer = 2 * index if right and not cut else 2 * index + 1
            text = f"First {index} + {index}.\nStep 1: count {index} twice.\n" + ("" if cut else f"\\boxed{{{answer}}}")
            samples.append(
                make_sample(
                    float(right and not cut),
                    tokens=random_source.randint(20, 60),
                    text=HOSTILE_TEXT if index + number == 0 else text,
                    finish_reason="length" if cut else "stop",
                    weight_version=step - 1,
                )
            )
        groups.append(SampleGroup(prompt=prompt, samples=tuple(samples)))
    return groups


def step_record(groups: list[SampleGroup], step: int, warmup: int, random_source: random.Random) -> Record:
    """A complete step record; the figures of training are plausible, those of the rollout are the groups' own."""
    pre_train = step <= warmup
    entropy = 0.5 + 0.3 * math.exp(-step / 20) + 0.02 * random_source.random()
    of_tokens = (
        {
            "pre_train/entropy": 1.0 + entropy,
            "pre_train/clip_fraction": 0.0,
            "pre_train/mean_log_prob_gap": 0.9 + 0.1 * random_source.random(),
        }
        if pre_train
        else {
            "policy/entropy": entropy,
            "policy/clip_fraction": 0.0,
            "mismatch/mean_log_prob_gap": 2e-6,
            "mismatch/max_log_prob_gap": 9e-6,
            "mismatch/kl_k1": 1e-8,
            "mismatch/kl_k3": 1e-12,
            "mismatch/ratio_tail_fraction": 0.0,
            "mismatch/max_ratio": 1.000009,
        }
    )
    generate = 4 + random_source.random()
    return {
        "step": step,
        "phase": "nsr-prerl" if pre_train else "grpo",
        "space": "pre_train" if pre_train else "post_train",
        "weight_version": step - 1,
        "time": 1_790_000_000.0 + 10 * step,
        **rollout_metrics(groups, count_tokens(groups), generate),
        "policy/loss": 0.01 * random_source.gauss(0, 1),
        "policy/kept_samples": 16 if pre_train else 32,
        "policy/kept_tokens": 640,
        "policy/grad_norm": 0.5 + 0.3 * random_source.random(),
        "policy/learning_rate": 3e-4,
        **of_tokens,
        "seconds/generate": generate,
        "seconds/train": 2.5,
        "seconds/push_weights": 0.3,
        "seconds/step": generate + 3.0,
    }


def write_run(
    folder: Path,
    steps: int = 12,
    planned: int | None = None,
    warmup: int = 4,
    learning_rate: float = 3e-4,
    gain: float = 0.35,
) -> list[Record]:
    """Write a run of `steps` of `planned` steps, evaluated before the first and after every fourth step.

    Held-out accuracy rises from 0.25 by `gain`.

    Returns the step records.
    """
    folder.mkdir(parents=True)
    config = CONFIG.format(name=folder.name, steps=planned or steps, warmup=warmup, learning_rate=learning_rate)
    (folder / "config.yaml").write_text(config)
    random_source = random.Random(7)
    records = []
    with Tracker(folder, tensorboard=False) as tracker:
        tracker.log_evaluation(evaluation_record(0, 0.25))
        for step in range(1, steps + 1):
            groups = sampled_groups(random_source, accuracy=0.2 + 0.5 * step / steps, step=step)
            write_groups(rollout_file(folder, step), groups)
            records.append(step_record(groups, step, warmup, random_source))
            tracker.log_step(records[-1])
            if step % 4 == 0:
                tracker.log_evaluation(evaluation_record(step, 0.25 + gain * step / steps))
    return records


def start_record(**changes: object) -> Record:
    """What produced a run, as `dsrl train` records it on 8 GPUs; other fields by name."""
    hashes = {"prompts.jsonl": {"bytes": 1000, "sha256": "d" * 64}}
    prompts = {"source": "prompts.jsonl", "subset": None, "split": None, "files": hashes, "prompts": 40}
    code = {"commit": "c" * 40, "dirty": False, "diff_sha256": None, "reason": None, "working_folder": None}
    return {
        "time": 1_790_000_000.0,
        "utc": "2026-09-21T13:33:20Z",
        "command": "train",
        "command_line": ["dsrl", "train", "configs/tiny.yaml"],
        "working_folder": "/home/someone",
        "hosts": ["node1"],
        "world_size": 8,
        "slurm": {"job_id": "17", "restart_count": "0"},
        "code": code,
        "python": "3.12.3 CPython (/opt/dsrl/bin/python)",
        "packages": {"torch": "2.14.1", "sglang": "0.5.23", "numpy": "2.4.6"},
        "device": {"platform": "cuda", "names": ["H100"] * 8, "cuda": "13.0", "driver": "580.95.05", "processor": "x"},
        "after_step": 0,
        "layout": {"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "sequence_parallel": True},
        "model": {"path": "Qwen/Qwen3-8B", "folder": "/cache", "hub_commit": "b" * 40, "fingerprint": "f" * 64},
        "data": {**prompts, "prompts_sha256": "a" * 64},
        "evaluation_sets": {"held-out": {**prompts, "prompts_sha256": "e" * 64}},
        **changes,
    }


def write_starts(folder: Path, *starts: Record) -> None:
    """As `dsrl train` leaves them."""
    (folder / PROVENANCE_FILE).write_text("".join(map(record_line, starts)))


def evaluation_record(step: int, accuracy: float) -> Record:
    """An evaluation of 256 problems, one sample each."""
    return {
        "step": step,
        "set": "held-out",
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / 256),
        "problems": 256,
        "samples_per_prompt": 1,
        "mean_tokens": 41.5,
        "truncated_fraction": 0.03125,
    }
