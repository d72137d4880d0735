"""Every method of configs/methods through the real training loop: two steps on recorded rollouts, no engine.

The rollouts are made up (random tokens, random rewards, log-probs of no particular policy): what is tested is that each
method's phases build what they need, train, and report under their names.
"""

import json
import random
from pathlib import Path

import pytest

from examples.tiny_dsrl.tokenizer import VOCAB_SIZE
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompts import load_prompts
from megatron_dsrl.data.samplers import PromptSampler
from megatron_dsrl.data.tokenizer import load_tokenizer
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.rollout.recording import rollout_file, write_groups
from megatron_dsrl.rollout.sample import Sample, SampleGroup
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3
from tests.support.tiny_run import write_tiny_run

METHODS = Path(__file__).parents[2] / "configs" / "methods"
NAMES = sorted(
    file.stem
    for file in METHODS.glob("*.yaml")
    if file.stem != "sft" and ("warmup_" not in file.stem or "then" in file.stem)
)
"""All but supervised fine-tuning, which takes no rollouts (tests/commands/test_train.py)."""
OPTIONS = {
    "with everything": (
        "grpo",
        [
            "phases.0.kl={loss_coefficient: 0.1, reward_coefficient: 0.1}",
            "phases.0.entropy_coefficient=0.01",
            "phases.0.importance_correction={name: masked, level: token}",
            "phases.0.drop_truncated=true",
            "actor.mini_batches_per_rollout=2",
        ],
    ),
    "own phase": (
        "grpo",
        [
            "phases.0.type=examples.own_algorithm.phase:FadingPhase",
            "phases.0.fading={name: fading, space: {name: pre_train}, advantage: group_mean, coefficient: 0.5}",
            "phases.0.fading_steps=1",
        ],
    ),
    "overlong shaping": ("grpo", ["reward.overlong={buffer_tokens: 8, penalty: 0.5}"]),
    "KL in the reward": ("reinforce_pp", ["phases.0.kl={reward_coefficient: 0.1}"]),
}
"""Further runs: a method with overrides."""

STEPS = 2


def runs(folder: Path) -> dict[str, RunConfig]:
    """By name, each with one step in the first of two phases."""
    base = write_tiny_run(folder)
    configs = {}
    rope = {"rope_type": "default", "rope_theta": 1e4}  # the student's
    make_tiny_qwen3(folder / "teacher", tied=True, vocab_size=VOCAB_SIZE, seed=2, rope=rope)
    teacher = [f"reference.path={folder / 'teacher'}"]  # distillation from the run's own weights has no gradient
    methods = {name: (name, teacher if "distillation" in name else []) for name in NAMES}
    for name, (method, overrides) in (methods | OPTIONS).items():
        file = folder / f"{name.replace(' ', '_')}.yaml"
        file.write_text(f"inherits: [{base}, {METHODS / method}.yaml]\nname: {file.stem}\n")
        replay = [f"rollout.replay_from={folder / 'recorded'}", "evaluation.sets=[]"]
        config = load_config(file, [*replay, f"steps={STEPS}", *overrides])
        if len(config.phases) == 2:
            config = load_config(file, [*replay, f"steps={STEPS}", "phases.0.until_step=1", *overrides])
        configs[name] = config
    return configs


def record_rollouts(folder: Path, config: RunConfig) -> None:
    """Made-up samples of the prompts that a run with this configuration takes; a group all wrong, one all right."""
    rng = random.Random(0)
    model = Path(config.model.path)
    tokenizer = load_tokenizer(str(model), read_architecture(model).vocab_size)
    prompts = load_prompts(config.data, tokenizer)
    sampler = PromptSampler(len(prompts), config.seed)

    def sample(reward: float) -> Sample:
        length = rng.randint(2, config.rollout.max_response_tokens)
        truncated = length == config.rollout.max_response_tokens
        return Sample(
            response_ids=tuple(rng.randrange(10) for _ in range(length)),
            log_probs=tuple(rng.uniform(-4, -2) for _ in range(length)),
            text="",
            finish_reason="length" if truncated else "stop",
            weight_version=STEPS,
            reward=reward,
        )

    for step in range(1, STEPS + 1):
        size = config.rollout.samples_per_prompt
        groups = [
            SampleGroup(prompts[i], tuple(sample(float(rng.random() < share)) for _ in range(size)))
            for i, share in zip(sampler.next(config.rollout.prompts_per_step), [0.0, 1.0, *[0.5] * 99])
        ]
        write_groups(rollout_file(folder / "recorded", step), groups)


def train_all(configs: dict[str, RunConfig]) -> None:
    from megatron_dsrl.train import train

    for config in configs.values():
        train(config)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, list[dict]]:
    """Step records of every run."""
    folder = tmp_path_factory.mktemp("methods")
    configs = runs(folder)
    record_rollouts(folder, configs["grpo"])
    run_distributed(train_all, 1, configs, timeout_seconds=280)
    files = {name: folder / "runs" / config.name / "metrics.jsonl" for name, config in configs.items()}
    return {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()}


@pytest.mark.parametrize("name", [*NAMES, *OPTIONS])
def test_it_trains(records, name) -> None:
    assert [record["step"] for record in records[name]] == [1, 2]
    for record in records[name]:
        assert record["policy/grad_norm"] > 0
        in_pre_train_space = "pre_train/mean_log_prob_gap" in record
        assert in_pre_train_space != ("mismatch/kl_k3" in record)


def test_the_filters_show_in_what_is_kept(records) -> None:
    everything = records["grpo"][0]["policy/kept_samples"]
    negative, positive = (records[name][0]["policy/kept_samples"] for name in ("nsr_rl", "psr_rl"))
    assert negative + positive == everything == 32
    assert records["nsr_prerl_only"][0]["policy/kept_samples"] < negative  # without all-wrong groups
    assert records["dsrl_negative_one"][0]["policy/kept_samples"] == negative


def test_the_switch_shows_in_the_space(records) -> None:
    first, second = records["dsrl"]
    assert (first["phase"], second["phase"]) == ("NSR-PreRL", "GRPO")
    assert (first["space"], second["space"]) == ("pre_train", "post_train")
    assert "pre_train/mean_log_prob_gap" in first and "mismatch/mean_log_prob_gap" in second
    assert "pre_train/entropy" in first and "policy/entropy" not in first and "policy/entropy" in second


def test_an_additional_objective_reports_under_its_own_name(records) -> None:
    first = records["joint_losses"][0]
    alone = records["nsr_prerl_only"][0]
    assert first["nsr_prerl/loss"] == pytest.approx(alone["policy/loss"], rel=1e-5)
    gap = "pre_train/mean_log_prob_gap"
    assert first[f"nsr_prerl/{gap}"] == pytest.approx(alone[gap], rel=1e-5)
    assert first["policy/total_loss"] == pytest.approx(first["policy/loss"] + first["nsr_prerl/loss"], rel=1e-5)


def test_a_custom_phase_differs_at_every_step(records) -> None:
    first, second = records["own phase"]
    assert first["policy/total_loss"] == pytest.approx(first["policy/loss"] + first["fading/loss"])
    assert not any(key.startswith("fading/") or key == "policy/total_loss" for key in second)


def test_what_overlong_shaping_subtracts_is_shown_beside_the_verifiers_score(records) -> None:
    for record in records["overlong shaping"]:
        assert 0 < record["reward/overlong_fraction"] < 1
        taken_off = record["reward/mean"] - record["reward/shaped_mean"]
        assert 0 < taken_off < 0.5 * record["reward/overlong_fraction"]
    assert "reward/shaped_mean" not in records["grpo"][0]


def test_kl_terms_compare_with_the_first_weights(records) -> None:
    first, second = (record["policy/reference_kl"] for record in records["KL in the reward"])
    assert abs(first) < 1e-6 < second


def test_a_correction_reports_its_fraction(records) -> None:
    assert 0 < records["with everything"][0]["policy/importance_masked_fraction"] < 1


def test_ppo_trains_its_critic(records) -> None:
    assert all(any(key.startswith("critic/") for key in record) for record in records["ppo"])
