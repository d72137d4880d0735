"""Held-out sets: what their evaluation asks the rollout side for, and the record it makes of the answers."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.benchmark import load_benchmark
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.run import EvaluationConfig, EvaluationSetConfig, is_due
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.evaluation.sample_file import first_responses
from megatron_dsrl.rollout.sample import Sample, SampleGroup, SamplingParameters
from megatron_dsrl.run.held_out import evaluate_set
from megatron_dsrl.run.start import check_verifiers


def sample(reward, num_tokens, finish_reason="stop", text="") -> Sample:
    return Sample((7,) * num_tokens, (-0.5,) * num_tokens, text, finish_reason, weight_version=1, reward=reward)


class RecordedRollout:
    """Gives prepared samples, and remembers what was asked for."""

    training_sampling = SamplingParameters(max_response_tokens=64, stop_token_ids=(2, 0), temperature=1.0)

    def __init__(self, samples_by_answer) -> None:
        self.samples_by_answer = samples_by_answer
        self.asked = []
        self.sampled = []

    def generate(self, prompts, samples_per_prompt, sampling, stream, *, rewards=None) -> list[SampleGroup]:
        self.sampled.append(sampling)
        self.asked.append(
            (len(prompts), samples_per_prompt, sampling.temperature, sampling.max_response_tokens, stream)
        )
        groups = [SampleGroup(prompt, self.samples_by_answer[prompt.answer]) for prompt in prompts]
        return [judged(group, rewards) for group in groups] if rewards else groups


def judged(group: SampleGroup, rewards) -> SampleGroup:
    """As the engines' side does it."""
    judgements = [rewards.submit(sample.text, group.prompt.answer).result() for sample in group.samples]
    return SampleGroup(group.prompt, tuple(replace(s, reward=j.reward) for s, j in zip(group.samples, judgements)))


PROMPTS = [Prompt(index=n, text=f"{n}+0=?", token_ids=(5, n), answer=str(n)) for n in (1, 2)]


def evaluation_set(name: str, **fields) -> EvaluationSetConfig:
    return EvaluationSetConfig(name=name, source="held_out.jsonl", **fields)


def test_record_of_each_set() -> None:
    rollout = RecordedRollout(
        {
            "1": (sample(1.0, 10, text=r"\boxed{1}"), sample(0.0, 64, "length", r"\boxed{9}")),
            "2": (sample(1.0, 4, text=r"\boxed{2}"), sample(1.0, 2, text=r"\boxed{2}")),
        }
    )
    sets = [
        (evaluation_set("sampled", samples_per_prompt=2, temperature=0.7), PROMPTS),
        (evaluation_set("short", samples_per_prompt=2, temperature=1.0), PROMPTS[:1]),
    ]
    (both, _), (short, _) = [
        evaluate_set(config, prompts, 5, rollout, "boxed", "evaluation.sets.0") for config, prompts in sets
    ]
    assert rollout.asked == [(2, 2, 0.7, 64, "evaluation sampled"), (1, 2, 1.0, 64, "evaluation short")]
    assert both == {
        "step": 5,
        "set": "sampled",
        "accuracy": 0.75,
        "standard_error": 0.25,  # problem means 0.5 and 1: their spread is 0.5 / sqrt(2), over sqrt(2) problems
        "problems": 2,
        "samples_per_prompt": 2,
        "mean_tokens": 20.0,
        "truncated_fraction": 0.25,
        "confidence_low_95": 0.5,
        "confidence_high_95": 1.0,
        "pass@2": 1.0,
        "majority@2": 0.75,  # a coin decides between 1 and 9
    }
    assert (short["set"], short["accuracy"], short["standard_error"], short["problems"]) == ("short", 0.5, None, 1)


def test_a_set_has_a_verifier_of_its_own() -> None:
    right, other = (replace(sample(0.0, 5), text=text) for text in ("The answer is (B).", r"\boxed{A}"))
    prompts = [Prompt(index=0, text="?", token_ids=(5,), answer="B")]
    choices = evaluation_set(
        "choices", samples_per_prompt=2, temperature=1.0, reward={"function": "multiple_choice", "workers": 1}
    )
    rollout = RecordedRollout({"B": (right, other)})
    record, problems = evaluate_set(choices, prompts, 0, rollout, "boxed", "evaluation.sets.0")
    assert record["accuracy"] == 0.5
    assert first_responses(problems, 1) == [
        {
            "problem": 0, "prompt": "?", "answer": "B", "response": "The answer is (B).", "reward": 1.0, "tokens": 5,
            "truncated": False, "verdict": "ok",
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "override"),
    [
        ("evaluation.sets.0", "evaluation.sets.0.reward={REWARD}"),
        (
            "data.mixed_with.0",
            "data.mixed_with=[{name: more, source: more.jsonl, max_prompt_tokens: 8, reward: {REWARD}}]",
        ),
    ],
)
def test_a_wrong_verifier_of_a_set_is_named_before_anything_starts(section, override) -> None:
    reward = "{function: multiple_choice, options: {box: true}}"
    config = load_config([Path("configs/tiny_dsrl.yaml")], [override.replace("{REWARD}", reward)])
    with pytest.raises(UserError, match=rf"^{section}.reward.options: multiple_choice does not take these options"):
        check_verifiers(config)


def test_early_and_late_frequency() -> None:
    """The paper's, as its configurations have it: every 5 steps up to 100, then every 25."""
    config = load_config(Path(__file__).parents[2] / "configs" / "dsrl_qwen3_8b.yaml").evaluation
    assert [step for step in range(1, 200) if is_due(step, config.interval_at(step), last_step=348)] == [
        *range(5, 101, 5), 125, 150, 175,
    ]  # fmt: skip
    assert EvaluationConfig(every_steps=10, early_until_step=50).interval_at(20) == 10


def test_a_set_is_sampled_with_its_own_settings_not_those_of_training() -> None:
    rollout = RecordedRollout({"1": (sample(1.0, 3),), "2": (sample(1.0, 3),)})
    rollout.training_sampling = SamplingParameters(
        64, stop_token_ids=(2, 0), temperature=0.8, top_p=0.7, top_k=5, return_routed_experts=True
    )
    sets = [
        (evaluation_set("plain"), PROMPTS),
        (evaluation_set("own", temperature=0.6, top_p=0.95, top_k=20, max_response_tokens=500), PROMPTS),
    ]
    for config, prompts in sets:
        evaluate_set(config, prompts, 1, rollout, "boxed", "evaluation.sets.0")
    assert rollout.sampled == [
        SamplingParameters(64, (2, 0), temperature=0.0, top_p=1.0, top_k=-1),
        SamplingParameters(500, (2, 0), temperature=0.6, top_p=0.95, top_k=20),
    ]


def test_a_set_inherits_a_benchmark_by_name_and_its_own_fields_win() -> None:
    (held_out,) = EvaluationConfig.model_validate_json(
        '{"sets": [{"benchmark": "aime24", "samples_per_prompt": 4, "top_p": 0.95}]}'
    ).sets
    benchmark = load_benchmark("aime24", None).config
    assert (held_out.name, held_out.samples_per_prompt, held_out.top_p) == ("aime24", 4, 0.95)
    taken = ("source", "split", "temperature", "max_response_tokens", "reward", "system_prompt")
    assert {field: getattr(held_out, field) for field in taken} == {field: getattr(benchmark, field) for field in taken}
    again = EvaluationConfig.model_validate_json(EvaluationConfig(sets=[held_out]).model_dump_json())
    assert again.sets == [held_out], "a run's saved configuration is the same"


def test_an_unknown_benchmark_of_a_set_is_named(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(
        "name: x\nsteps: 1\nmodel: {path: m}\ndata: {source: s.jsonl}\nphases: []\n"
        "evaluation: {sets: [{benchmark: aime1924}]}\n"
    )
    with pytest.raises(UserError, match="evaluation.sets.0.*unknown benchmark `aime1924`; choose one of aime24, "):
        load_config(tmp_path / "run.yaml", [])
