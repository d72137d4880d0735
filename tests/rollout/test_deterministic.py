"""Sampling that does not depend on what was sampled before, on other requests, or on the engine's process."""

import os
import resource
from dataclasses import replace

import pytest

from megatron_dsrl.rollout.engine_rollout import EngineRollout
from tests.support.engine import STOP_TOKEN_ID, decode_as_numbers, numbered_prompts, tiny_run_config

SAMPLES = 8


def tokens(groups) -> list[tuple[int, ...]]:
    return [tuple(sample.response_ids) for group in groups for sample in group.samples]


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.8, "top_k": 20}], ids=["whole distribution", "top-k and top-p"])
def test_a_sample_depends_on_its_seed_alone(engine_rollout, changes) -> None:
    """The same tokens alone and among others. (Rounding could decide otherwise; with these weights it does not.)"""
    if engine_rollout.weight_version < 0:
        pytest.skip("no weights")
    prompts, sampling = numbered_prompts(6), replace(engine_rollout.training_sampling, **changes)
    together = engine_rollout.generate(prompts, SAMPLES, sampling, "step 1")
    alone = engine_rollout.generate(prompts[3:4], SAMPLES, sampling, "step 1")
    assert tokens(alone) == tokens(together)[3 * SAMPLES : 4 * SAMPLES]
    assert len(set(tokens(alone))) == SAMPLES
    other_step = engine_rollout.generate(prompts, SAMPLES, sampling, "step 2")
    assert set(tokens(other_step)).isdisjoint(tokens(together))


def test_samples_drawn_one_by_one_are_those_of_the_groups(engine_rollout) -> None:
    """Also where few files may be open: every sample on its way is a connection."""
    if engine_rollout.weight_version < 0:
        pytest.skip("no weights")
    prompts, sampling = numbered_prompts(12), engine_rollout.training_sampling
    groups = {group.prompt: group for group in engine_rollout.generate(prompts, SAMPLES, sampling, "step 1")}
    wanted = [(prompt, number) for prompt in prompts for number in (6, 0, 3, 7)]
    drawn = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 24, limits[1]))
    try:
        engine_rollout.generate_samples(
            wanted, sampling, "step 1", lambda prompt, number, sample: drawn.append((prompt, number, sample))
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(drawn) == len(wanted) and {(prompt, number) for prompt, number, _ in drawn} == set(wanted)
    for prompt, number, sample in drawn:
        assert sample.response_ids == groups[prompt].samples[number].response_ids


def sample_in_a_new_engine(model_folder, run_folder, *, after_other_batches: bool) -> list:
    """48 prompts of different lengths with 4 samples each, 192 in all: several prefill batches."""
    config = tiny_run_config(model_folder, extra_arguments={"max_prefill_tokens": 512, "chunked_prefill_size": 512})
    deterministic = config.rollout.model_copy(update={"deterministic": True})
    config = config.model_copy(update={"rollout": deterministic})
    rollout = EngineRollout(config, run_folder, (STOP_TOKEN_ID,), decode_as_numbers)
    prompts = [replace(p, token_ids=p.token_ids[:60]) for p in numbered_prompts(48)]
    sampling = replace(rollout.training_sampling, stop_token_ids=tuple(range(6)))
    try:
        rollout.wait_until_ready()
        if after_other_batches:
            rollout.generate(prompts[:7], 5, replace(sampling, temperature=0.3), "evaluation a")
            rollout.generate(prompts, 1, replace(sampling, temperature=0.0), "evaluation b")
        return rollout.generate(prompts, 4, sampling, "step 1")
    finally:
        rollout.close()


@pytest.mark.slow
def test_a_batch_is_bitwise_the_same_in_another_process_after_other_batches(tiny_model_folder, tmp_path) -> None:
    first = sample_in_a_new_engine(tiny_model_folder, tmp_path / "one", after_other_batches=False)
    second = sample_in_a_new_engine(tiny_model_folder, tmp_path / "other", after_other_batches=True)
    assert first == second  # tokens and log-probs
    lengths = {len(response) for response in tokens(first)}
    assert len(lengths) > 5, "the samples end at different times"
