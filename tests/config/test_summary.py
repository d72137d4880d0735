"""Derived figures and layout checks."""

import re
from dataclasses import replace

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.layout import ModelShape
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.summary import batch_lines, derive

SHAPE = ModelShape(layers=6, attention_heads=8, key_value_groups=4, feed_forward_size=96, context_tokens=512)


def test_figures_of_a_worked_example(small, write) -> None:
    overrides = ["parallel.tensor_parallel_size=2", "engine.tensor_parallel_size=4", "actor.mini_batches_per_rollout=2"]
    figures = derive(load_config(write("run.yaml", small), overrides), world_size=8, shape=SHAPE, prompts=32)
    assert (figures.data_parallel_size, figures.engines) == (4, 2)
    assert (figures.samples_per_step, figures.samples_per_optimizer_step) == (32, 16)
    assert figures.optimizer_steps == 12
    assert figures.longest_sequence == 160
    assert figures.max_generated_tokens_per_step == 32 * 60
    assert figures.epochs == 6 * 8 / 32
    warm_up, grpo = figures.phases
    assert (warm_up.first_step, warm_up.last_step, warm_up.steps) == (1, 2, 2)
    assert (grpo.first_step, grpo.last_step, grpo.steps) == (3, 6, 4)
    # PreRL trains on at most a 3-token BOS and the response; GRPO on prompt and response.
    assert (warm_up.max_tokens_per_step, grpo.max_tokens_per_step) == (32 * 63, 32 * 160)


def test_micro_batches_hold_whole_sequences(small, write) -> None:
    """32 samples of 160 tokens, 6 to a budget of 1000 (not 6.25): 6 micro-batches; one each below 160 tokens."""
    path = write("run.yaml", small)
    assert derive(load_config(path), 1, SHAPE).phases[1].full_length_micro_batches == 6
    tight = load_config(path, ["actor.max_tokens_per_micro_batch=100"])
    assert derive(tight, 1, SHAPE).phases[1].full_length_micro_batches == 32
    assert derive(tight, 4, SHAPE).phases[1].full_length_micro_batches == 8


def test_micro_batches_of_split_sequences_and_pipelines(small, write) -> None:
    """Context parallelism pads 160 tokens to 162 (a multiple of 6); interleaving needs a multiple of 4 of them."""
    path = write("run.yaml", small)
    context = load_config(path, ["parallel.context_parallel_size=3", "actor.max_tokens_per_micro_batch=960"])
    assert derive(context, 3, SHAPE).phases[1].full_length_micro_batches == 7  # 5 a budget, not 6
    shape = replace(SHAPE, layers=8)
    virtual = ["parallel.pipeline_parallel_size=4", "parallel.virtual_pipeline_stages=2"]
    assert derive(load_config(path, virtual), 4, shape).phases[1].full_length_micro_batches == 8  # not 6


def test_batch_sizes_in_words(small, write) -> None:
    overrides = ["actor.mini_batches_per_rollout=2", "parallel.context_parallel_size=2"]
    config = load_config(write("run.yaml", small), overrides)
    assert batch_lines(config, derive(config, world_size=4, shape=SHAPE)) == [
        "every step: 8 prompts x 4 samples = 32; 2 optimizer steps of 16 (2 mini-batches x 1 epoch)",
        "layout: 4 processes = 2 data-parallel x 1 tensor x 1 pipeline x 2 context",
        "micro-batches of up to 1,000 tokens; per optimizer step, at full length: 1 (warm-up), 2 (grpo)",
    ]


def test_every_objective_of_a_phase_is_a_separate_pass(small, write) -> None:
    joint = "[{name: nsr, space: {name: pre_train}, advantage: fixed, filter: negative}]"
    config = load_config(write("run.yaml", small), [f"phases.1.additional_objectives={joint}"])
    phase = derive(config, 1, SHAPE).phases[1]
    assert phase.space == "post_train + pre_train"
    # 6 of 160 tokens to a micro-batch, and 15 of 63
    assert (phase.max_tokens_per_step, phase.full_length_micro_batches) == (32 * (160 + 63), 6 + 3)


def test_one_sample_per_prompt_is_enough_where_nothing_is_compared(small, write) -> None:
    small["phases"] = [{"name": "REINFORCE++", "space": {"name": "post_train"}, "advantage": "reinforce_pp"}]
    config = load_config(write("run.yaml", small), ["rollout.samples_per_prompt=1"])
    assert derive(config, 1, SHAPE).samples_per_step == 8


def test_a_phase_that_the_run_ends_before_has_no_steps(small, write) -> None:
    figures = derive(load_config(write("run.yaml", small), ["steps=2"]), 1, SHAPE)
    assert [phase.steps for phase in figures.phases] == [2, 0]
    assert figures.epochs is None


@pytest.mark.parametrize(
    ("overrides", "world_size", "fields", "words"),
    [
        (["parallel.pipeline_parallel_size=2"], 3, "parallel.pipeline_parallel_size", "3 processes cannot be divided"),
        (["engine.tensor_parallel_size=4"], 2, "engine.tensor_parallel_size", "engines of 4"),
        (["parallel.sequence_parallel=true"], 1, "parallel.sequence_parallel", "needs parallel.tensor_parallel_size"),
        (["parallel.tensor_parallel_size=3"], 3, "parallel.tensor_parallel_size", "8 attention heads"),
        (["parallel.tensor_parallel_size=8"], 8, "parallel.tensor_parallel_size", "4 key/value heads"),
        (["parallel.pipeline_parallel_size=4"], 4, "parallel.pipeline_parallel_size", "6 layers cannot be split 4"),
        (["engine.tensor_parallel_size=3"], 3, "engine.tensor_parallel_size", "8 attention heads cannot be split 3"),
        (["parallel.collective_timeout_seconds=3600"], 1, "collective_timeout_seconds", "must wait longer than 3600 s"),
        (["phases.0.until_step=null"], 1, "phases.0.until_step", "only the last phase"),
        (["phases.1.until_step=2"], 1, "phases.1.until_step", "2 is not after the phase before it"),
        (["phases.1.until_step=4"], 1, "phases.1.until_step", "no phase covers steps 5 to 6"),
        (["actor.mini_batches_per_rollout=3"], 1, "actor.mini_batches_per_rollout", "8 prompts cannot be"),
        (["rollout.prompts_per_step=1"], 8, "rollout.prompts_per_step", "some of the 8 data-parallel replicas"),
        (["rollout.prompts_per_step=64"], 1, "data.source, rollout.prompts_per_step", "only 32 prompts for 64"),
        (["rollout.samples_per_prompt=1"], 1, "rollout.samples_per_prompt", "at least 2"),
        (
            ["phases.1.advantage=fixed", "phases.1.kl={reward_coefficient: 0.1}"],
            1,
            "phases.1, kl.reward_coefficient",
            "`fixed` ignores penalties",
        ),
        (
            ["phases.0.loss=policy_gradient", "actor.epochs_per_rollout=2"],
            1,
            "phases.0, actor.mini_batches_per_rollout, actor.epochs_per_rollout",
            "for one optimizer step per rollout batch, this run takes 2",
        ),
        (["rollout.top_k=0"], 1, "rollout.top_k", "use -1"),
        (["model.router.dtype=model"], 1, "model.router", "the model has none; leave the section out"),
        (["rollout.max_response_tokens=413"], 1, "data.max_prompt_tokens", "100 + 413 = 513 tokens do not fit"),
        (["reward.overlong.buffer_tokens=61"], 1, "reward.overlong.buffer_tokens", "would penalise every response"),
        (["engine.max_total_tokens=159"], 1, "rollout.max_response_tokens", "into 159, the limit of engine.max_total"),
        (["engine.max_context_tokens=100"], 1, "rollout.max_response_tokens", "the limit of engine.max_context"),
        (["engine.max_context_tokens=513"], 1, "engine.max_context_tokens", "beyond the model's own 512"),
        (
            ["evaluation.sets=[{name: a, source: x.jsonl, max_prompt_tokens: 500}]"],
            1,
            "evaluation.sets.0.max_prompt_tokens",
            "500 + 60 = 560 tokens",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(small, write, overrides, world_size, fields, words) -> None:
    config = load_config(write("run.yaml", small), overrides)
    with pytest.raises(UserError, match=f"(?m)^  .*{re.escape(fields)}.*: .*{re.escape(words)}"):
        derive(config, world_size, SHAPE, prompts=32)


@pytest.mark.parametrize(
    ("overrides", "fields", "words"),
    [
        ([], "actor.lora.target_modules", "leave out gate_proj, up_proj, down_proj"),
        (["model.random_init=true"], "actor.lora, model.random_init", "start from a model with weights"),
        (
            ["reference.path=other/model", "reference.refresh_every_steps=2"],
            "actor.lora, reference.path",
            "not all weights of a refreshed reference",
        ),
    ],
)
def test_what_lora_cannot_do_is_refused(small, write, overrides, fields, words) -> None:
    config = load_config(write("run.yaml", small), ["actor.lora.rank=8", *overrides])
    experts = replace(SHAPE, experts=4, expert_feed_forward_size=48)
    with pytest.raises(UserError, match=f"(?m)^  {re.escape(fields)}: .*{re.escape(words)}"):
        derive(config, 1, experts, prompts=32)


def test_attention_of_a_mixture_of_experts_can_have_adapters(small, write) -> None:
    config = load_config(write("run.yaml", small), ["actor.lora.target_modules=[q_proj, v_proj]"])
    derive(config, 1, replace(SHAPE, experts=4, expert_feed_forward_size=48), prompts=32)
    with pytest.raises(UserError, match="actor.lora.target_modules: .*named twice"):
        load_config(write("run.yaml", small), ["actor.lora.target_modules=[q_proj, q_proj]"])


SUPERVISED = [{"name": "SFT", "space": "post_train", "advantage": "raw_reward", "loss": "supervised"}]
FROM_A_DATA_SET = ["rollout.source=dataset", "rollout.samples_per_prompt=1"]


def test_a_run_on_a_data_set_has_no_engine_and_none_of_its_limits(small, write) -> None:
    path = write("run.yaml", small | {"phases": SUPERVISED})
    without = ["engine.tensor_parallel_size=3", "engine.max_total_tokens=100"]
    config = load_config(path, [*FROM_A_DATA_SET, *without])
    figures = derive(config, 1, SHAPE, prompts=32)
    assert (figures.engines, figures.epochs, figures.samples_per_step) == (0, 1.5, 8)
    assert figures.max_generated_tokens_per_step == 0
    expected = "every step: 8 responses of the data set, 1.50 epochs of 32 in all; 1 optimizer step of 8"
    assert batch_lines(config, figures)[0] == expected


@pytest.mark.parametrize(
    ("override", "fields", "words"),
    [
        ("rollout.samples_per_prompt=4", "rollout.source, rollout.samples_per_prompt", "one response per prompt"),
        ("rollout.temperature=0.5", "rollout.source, rollout.temperature", "set it to 1"),
        ("phases.0.loss=dual_clip", "phases.0.loss", "use `loss: supervised`"),
        ("phases.0.importance_correction=truncated", "phases.0.importance_correction", "set it to null"),
    ],
)
def test_what_a_data_set_does_not_have_is_refused(small, write, override, fields, words) -> None:
    config = load_config(write("run.yaml", small | {"phases": SUPERVISED}), [*FROM_A_DATA_SET, override])
    with pytest.raises(UserError, match=f"(?m)^  {re.escape(fields)}: .*{re.escape(words)}"):
        derive(config, 1, SHAPE, prompts=32)


def test_a_data_set_is_accepted_unchanged(small, write) -> None:
    with pytest.raises(UserError, match="source: dataset cannot be combined with dynamic_sampling, max_staleness"):
        sampling = ["rollout.dynamic_sampling={}", "rollout.max_staleness=1"]
        load_config(write("run.yaml", small), [*FROM_A_DATA_SET, *sampling])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.deterministic=true", "max_staleness cannot be combined with deterministic: which weights"),
        ("rollout.partial_rollouts={}", "max_staleness cannot be combined with partial_rollouts: asynchronous"),
        ("rollout.replay_from=runs/a", "max_staleness cannot be combined with replay_from: nothing is sampled"),
        ("rollout.dynamic_sampling={oversampling: 1.5}", "cannot be combined with dynamic_sampling.oversampling"),
    ],
)
def test_what_conflicts_with_asynchronous_sampling_is_refused(small, write, override, message) -> None:
    with pytest.raises(UserError, match=message):
        load_config(write("run.yaml", small), ["rollout.max_staleness=2", override])


def test_asynchronous_sampling_needs_engines_elsewhere(small, write) -> None:
    config = load_config(write("run.yaml", small), ["rollout.max_staleness=2"])
    with pytest.raises(UserError, match="rollout.max_staleness, engine.urls: engines that share the trainer's devices"):
        derive(config, 1, SHAPE, prompts=32)


def test_held_out_sets_that_would_be_mixed_up_or_sampled_in_vain_are_refused(small, write) -> None:
    one = "{name: a, source: a.jsonl, max_prompt_tokens: 64, samples_per_prompt: 4}"
    config = load_config(write("run.yaml", small), [f"evaluation.sets=[{one}, {one}]"])
    with pytest.raises(UserError, match="evaluation.sets: the name a is used more than once") as raised:
        derive(config, 1, SHAPE, prompts=32)
    assert "evaluation.sets.1.temperature, evaluation.sets.1.samples_per_prompt: temperature 0 is" in str(raised.value)


def test_limits_themselves_are_allowed(small, write) -> None:
    overrides = ["rollout.max_response_tokens=412", "engine.max_context_tokens=512", "engine.max_total_tokens=512"]
    assert derive(load_config(write("run.yaml", small), overrides), 1, SHAPE, prompts=8).longest_sequence == 512
    # SGLang copies key/value heads for more processes than heads.
    engine = load_config(write("run.yaml", small), ["engine.tensor_parallel_size=8", "rollout.prompts_per_step=8"])
    assert derive(engine, 8, SHAPE).engines == 1


def test_all_problems_are_listed_at_once(small, write) -> None:
    config = load_config(write("run.yaml", small), ["rollout.top_k=0", "phases.0.until_step=null"])
    with pytest.raises(UserError, match="^run `small` on 1 process: 2 problems\n"):
        derive(config, 1, SHAPE)
