"""Rollouts of random tokens, as a run would have recorded them: a run can train on them without an engine."""

import math
import random
from pathlib import Path

from examples.tiny_dsrl.tokenizer import VOCAB_SIZE
from megatron_dsrl.config.load import load_config
from megatron_dsrl.rollout.recording import rollout_file, write_groups
from megatron_dsrl.rollout.sample import Sample, SampleGroup
from megatron_dsrl.run.inputs import load_inputs


def record_random_rollouts(config_file: Path, steps: int) -> Path:
    """Write the rollouts of these steps of a tiny run, for `rollout.replay_from`; returns their run folder."""
    config, source = load_config(config_file), random.Random(0)
    rollout, folder = config.rollout, config_file.parent / "runs" / "recorded"
    prompts = load_inputs(config).prompts

    def sample(step: int) -> Sample:
        length = source.randint(2, rollout.max_response_tokens)
        tokens = tuple(source.randrange(VOCAB_SIZE) for _ in range(length))
        log_probs = (-math.log(VOCAB_SIZE),) * length
        return Sample(tokens, log_probs, "", "stop", weight_version=step, reward=float(source.randrange(2)))

    for step in range(1, steps + 1):
        drawn = source.sample(prompts, rollout.prompts_per_step)
        groups = [
            SampleGroup(prompt, tuple(sample(step) for _ in range(rollout.samples_per_prompt))) for prompt in drawn
        ]
        write_groups(rollout_file(folder, step), groups)
    return folder
