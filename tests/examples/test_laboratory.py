"""The laboratory: documents, statistics, sweeps and page, and the whole pipeline at a small size."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from examples.laboratory import claims
from examples.laboratory.base_properties import properties_of
from examples.laboratory.behaviours import behaviours_of
from examples.laboratory.collect import as_columns, collect
from examples.laboratory.page import write_page
from examples.laboratory.paired import PairedDifference, paired, power_of_paired_test, verdict
from examples.laboratory.results_data import read_results
from examples.laboratory.settings import BASES, PIECES, VOCAB_SIZE
from examples.laboratory.task import (
    NO,
    Family,
    Problem,
    different_problems,
    draw_problems,
    parse_problem,
    split_of,
    write_response,
)
from examples.laboratory.verifier import reaches_target
from megatron_dsrl.analysis.responses import RecordedResponse
from megatron_dsrl.analysis.thoughts import count_thoughts
from megatron_dsrl.cli import main
from megatron_dsrl.config.load import load_config
from megatron_dsrl.observability.records import replace_records
from megatron_dsrl.run.sweep import load_sweep, runs_of
from tests.support.tiny_run import dsrl

LABORATORY = Path("examples/laboratory")
SWEEPS = ("learning_rate", "comparison", "warmup_lengths", "map", "remedies")


def written_by(family: Family, patient: bool, count: int = 2000) -> list[tuple[Problem, str]]:
    rng = random.Random(1)
    problems = draw_problems("corpus", family.numbers, rng)
    return [(problem, write_response(problem, family, patient, rng)) for _, problem in zip(range(count), problems)]


def accuracy(written: list[tuple[Problem, str]]) -> float:
    return sum(reaches_target(text, problem.text) for problem, text in written) / len(written)


def thoughts(written: list[tuple[Problem, str]]) -> float:
    counts = [count_thoughts(text) for _, text in written]
    return sum(count.reflections + count.transitions for count in counts) / len(counts)


def test_patient_documents_search_and_are_right_hasty_ones_mostly_stop_at_the_first_attempt() -> None:
    patient, hasty = written_by(Family(), True), written_by(Family(), False)
    assert accuracy(patient) > 0.9 and thoughts(patient) > 1.5
    assert 0.2 < accuracy(hasty) < 0.4 and 0 < thoughts(hasty) < 0.3
    searching = [one for one in hasty if thoughts([one]) > 0]
    assert accuracy(searching) > accuracy(hasty) + 0.1


def test_a_verdict_and_a_check_tell_the_truth() -> None:
    for problem, text in written_by(Family(visible=1.0, search=1.0, checks=1.0), False, 200):
        parts = text.split("\n\n")
        for attempt, check in zip(parts[0:-1:2], parts[1:-1:2]):
            reached = int(attempt.split()[-2].rpartition("=")[2])
            assert attempt.endswith("Yes." if reached == problem.target else "No.")
            not_ = "" if reached == problem.target else "not "
            assert check == f"Let me check: {reached} is {not_}{problem.target}."


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"wording": 6}, lambda text: len(text)),
        ({"numbers": 4}, lambda text: len(text)),
        ({"restates_problem": True}, lambda text: text.count("Make ")),
        ({"visible": 1.0}, lambda text: text.count(" No.")),
        ({"search": 0.5}, lambda text: text.count("Alternatively")),
        ({"subgoals": 1.0, "search": 0.5}, lambda text: text.count("I need")),
        ({"insight": 0.5}, lambda text: text.count(" Yes.")),
    ],
)
def test_every_dial_of_the_responses_turns(change, more) -> None:
    before, after = (sum(more(text) for _, text in written_by(Family(**one), False, 500)) for one in ({}, change))
    assert after > 1.2 * before


def test_the_tokenizer_reads_every_response_without_unknown_characters() -> None:
    from examples.tiny_dsrl.tokenizer import UNKNOWN, build_tokenizer

    tokenizer = build_tokenizer(PIECES, VOCAB_SIZE)
    for problem, text in written_by(Family(restates_problem=True, search=0.5), False, 50):
        for one in (problem.text, text):
            ids = tokenizer.encode(one, add_special_tokens=False)
            assert tokenizer.decode(ids) == one and UNKNOWN not in one
            assert tokenizer.convert_tokens_to_ids(UNKNOWN) not in ids
    assert len(tokenizer.encode("Let me check: 7 is not 4.", add_special_tokens=False)) == 5


def test_a_problem_is_in_one_split_however_its_numbers_are_ordered() -> None:
    problem = Problem((2, 7, 5), 4)
    assert parse_problem(f"<|im_start|>user\n{problem.text}<|im_end|>") == problem
    assert parse_problem("2+7") is None
    assert split_of(problem) == split_of(Problem((7, 5, 2), 4))


@pytest.mark.parametrize("base", BASES)
def test_every_base_has_enough_problems(base) -> None:
    settings = BASES[base]
    for split, wanted in (("train", settings.train_problems), ("held_out", settings.held_out_problems)):
        found = different_problems(split, settings.family.numbers, wanted, random.Random(1))
        assert len(set(found)) == wanted and {split_of(problem) for problem in found} == {split}
    with pytest.raises(ValueError, match="different problems with 2 numbers in train, not 900"):
        different_problems("train", 2, 900, random.Random(1))


@pytest.mark.parametrize(
    ("box", "reward"),
    [("2+7-5", 1.0), ("7-5+2", 1.0), ("2+7+5", 0.0), ("2+2", 0.0), ("4", 0.0), ("2+7-5=4", 0.0), ("7-(5-2)", 0.0)],
)
def test_the_verifier_evaluates_the_boxed_expression(box, reward) -> None:
    assert reaches_target(f"So 1+1=2\n\n\\boxed{{{box}}}", "Make 4 from 2, 7, 5.") == reward
    assert reaches_target(box, "Make 4 from 2, 7, 5.") == 0.0
    with pytest.raises(ValueError, match="expected a question"):
        reaches_target(box, "4")


def test_behaviours_are_found_by_rule() -> None:
    searching = "2+7=9\n9+5=14 No.\n\nWait, go back. 2+7=9\n9-5=4 Yes.\n\n\\boxed{2+7-5}"
    none = dict.fromkeys(("subgoal_setting", "enumeration", "verification", "backtracking"), False)
    assert behaviours_of("2+7=9\n9+5=14 No.\n\n\\boxed{2+7+5}") == none
    assert behaviours_of(searching) == none | {"enumeration": True, "backtracking": True}
    assert behaviours_of("2+7=9\n\nWait, go back. ") == none
    checked = "Let me check: 9 is not 4.\n\nAlternatively, I need 9 before -5. 2+7=9"
    assert behaviours_of(checked) == none | {"verification": True, "subgoal_setting": True}


def test_differences_are_paired_by_seed() -> None:
    found = paired({1: 5.0, 2: 6.0, 3: 9.0}, {3: 6.0, 1: 4.0, 7: 0.0})
    assert found.values == (1.0, 3.0) and found.mean == 2.0
    low, high = found.student
    assert low == pytest.approx(2 - 12.706, abs=0.01) and high == pytest.approx(2 + 12.706, abs=0.01)
    assert PairedDifference((1.0,)).student is None
    with pytest.raises(ValueError, match="no seed in common"):
        paired({1: 1.0}, {2: 1.0})


def test_power_is_the_level_without_a_difference_and_matches_a_simulation_with_one() -> None:
    import numpy as np
    from scipy import stats

    assert power_of_paired_test(0.0, 4.0, 5) == pytest.approx(0.05)
    differences = np.random.default_rng(1).normal(3.0, 3.0, (20_000, 5))
    found = (stats.ttest_1samp(differences, 0.0, axis=1).pvalue < 0.05).mean()
    assert power_of_paired_test(3.0, 3.0, 5) == pytest.approx(found, abs=0.01)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((1, 2), "agree"), ((-2, -1), "disagree"), ((-1, 1), "cannot tell"), (None, "cannot tell")],
)
def test_a_verdict_needs_the_whole_interval(interval, expected) -> None:
    assert verdict(interval, low=0) == expected


def test_the_conditions_of_a_base() -> None:
    def answers(problem: int, right: int, text: str) -> list[RecordedResponse]:
        return [RecordedResponse(0, problem, i, "", text, float(i < right), 20) for i in range(32)]

    good = properties_of(answers(0, 8, "2+7=9") + answers(1, 8, "2+7=9"))
    assert all(good["conditions"].values()) and good["pass@32"] == 1.0
    bad = properties_of(answers(0, 32, "Wait, go back. 2+7=9") + answers(1, 0, "2+7=9"))
    assert [met for met in bad["conditions"].values()] == [False, False, False, True]


def test_the_remedy_keeps_wrong_responses_that_say_so() -> None:
    from examples.laboratory.remedies import WrongAndSaysSo
    from examples.tiny_dsrl.tokenizer import build_tokenizer
    from megatron_dsrl.algorithms.advantages import GroupMean
    from megatron_dsrl.algorithms.experience import Response, build_experience
    from megatron_dsrl.algorithms.spaces import PostTrain

    said = build_tokenizer(PIECES, VOCAB_SIZE).convert_tokens_to_ids(NO)
    sweep = yaml.safe_load((LABORATORY / "remedies.yaml").read_text())
    assert f"token_id: {said}" in sweep["runs"]["DSRL, only mistakes that can be seen"]["overrides"][1]
    prompt = (said, 90)
    answers = [((91, said), 0.0), ((91, 92), 0.0), ((said, 92), 1.0)]
    responses = [Response(prompt, ids, (0.0, 0.0), reward, 0) for ids, reward in answers]
    experience = build_experience(responses, PostTrain())
    estimate = GroupMean().estimate(experience)
    kept = WrongAndSaysSo(name="custom", token_id=said).keep(replace(experience, advantages=estimate.advantages))
    assert kept.tolist() == [True, False, False]


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b"])
def test_a_wrong_part_of_a_sweep_is_refused(part, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "examples/laboratory/comparison.yaml", "--part", part])
    assert "expected K/N with K from 1 to N, such as 2/8" in capsys.readouterr().err


@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_every_sweep_is_a_valid_configuration(name) -> None:
    file = LABORATORY / f"{name}.yaml"
    made = {f".cache/laboratory/{base}/base" for base in BASES}
    sweep = load_sweep(file)
    for run in runs_of(sweep, file.parent)[: len(sweep.runs)]:  # of one seed
        config = load_config(run.configs, run.settings)
        assert config.model.path in made
        assert Path(config.data.source).parent == Path(config.model.path).parent
        assert Path(config.evaluation.sets[0].source).parent == Path(config.model.path).parent


def made_up_run(method: str, seed: int, accuracy: float) -> dict:
    steps = [
        {
            "step": step,
            "accuracy": accuracy,
            "reflections": 0.1 * step,
            "transitions": 0.2,
            "response/mean_tokens": 30.0,
            "response/truncated_fraction": 0.0,
            "solved": 1,
            "unsolved": 2,
            **dict.fromkeys(("subgoal_setting", "enumeration", "verification", "backtracking"), 0.1),
        }
        for step in range(1, 41)
    ]
    evaluations = [
        {"step": step, "accuracy": value} | {f"pass@{2**i}": value for i in range(1, 7)}
        for step, value in ((0, 0.25), (40, accuracy))
    ]
    phases = [[method, 1, 40]]
    return {
        "method": method,
        "seed": seed,
        "commit": "abc",
        "phases": phases,
        "evaluations": evaluations,
        "steps": as_columns(steps),
    }


def test_the_page_judges_the_claims_from_the_collected_files(tmp_path) -> None:
    methods = {"GRPO": 0.4, "DSRL": 0.5, "NSR-PreRL only": 0.1}
    runs = [made_up_run(name, seed, mean + 0.01 * seed) for name, mean in methods.items() for seed in (1, 2, 3)]
    replace_records(tmp_path / "comparison.jsonl", runs)
    write_page(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| DSRL | 3 | 52.0 ± 2.5 | +10.00; bootstrap +10.00 to +10.00; t +10.00 to +10.00 |" in page
    collected = read_results(tmp_path / "comparison.jsonl")
    found = {claim.number: claims.judge(claim, collected) for claim in claims.CLAIMS}
    verdicts = {number: one.verdict for number, one in found.items()}
    assert verdicts[1] == "agree"
    assert verdicts[2] == "cannot tell" and found[2].runs == 0
    assert verdicts[4] == "disagree"  # transitions have not grown
    assert verdicts[5] == "agree"
    assert verdicts[7] == "agree"
    assert (tmp_path / "warm-ups_over_steps.svg").exists()
    assert "## The map\n\nNot run yet: `bash examples/laboratory/run.sh bases map`." in page


def test_the_page_pairs_the_map_and_the_remedies_by_seed(tmp_path) -> None:
    cells = {"hidden, 0": (0.4, 0.5), "hidden, 8": (0.3, 0.4), "visible, 0": (0.4,)}
    remedies = {"DSRL, other context": (0.35, 0.45)}
    for file, methods in (("map", cells), ("remedies", remedies)):
        runs = [made_up_run(name, seed, mean) for name, means in methods.items() for seed, mean in enumerate(means)]
        replace_records(tmp_path / f"{file}.jsonl", runs)
    write_page(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| hidden | -10.0 ± 0.0 |\n| visible | - |\n| all cells | -10.0 ± 0.0 |" in page
    assert "| DSRL, other context | 2 | 40.0 ± 63.5 | -5.00; bootstrap" in page and "| +5.00; bootstrap" in page


def test_the_whole_pipeline_at_a_small_size(tmp_path, monkeypatch) -> None:
    """Base, two methods, collection and page: a tenth of the comparison's steps and samples."""
    from examples.laboratory.make_base import make

    make(tmp_path / "small", BASES["small"])
    overrides = [
        "steps=4",
        f"model.path={tmp_path}/small/base",
        f"data.source={tmp_path}/small/train.jsonl",
        f"evaluation.sets.0.source={tmp_path}/small/held_out.jsonl",
        "evaluation.sets.0.samples_per_prompt=4",
        "rollout.prompts_per_step=2",
        "rollout.max_response_tokens=48",
    ]
    here = (Path.cwd() / LABORATORY).resolve()
    runs = {
        "GRPO": {"config": [f"{here}/size.yaml", f"{here}/../../configs/methods/grpo.yaml"]},
        "DSRL": {
            "config": [f"{here}/size.yaml", f"{here}/../../configs/methods/dsrl.yaml"],
            "overrides": ["phases.0.until_step=2"],
        },
    }
    sweep = {"output_dir": f"{tmp_path}/runs", "seeds": [1], "baseline": "GRPO", "overrides": overrides, "runs": runs}
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    for part in ("1/2", "2/2"):
        done = dsrl("sweep", str(file), "--part", part)
        assert done.returncode == 0, done.stderr
    records = collect(file, tmp_path / "results")
    assert [record["method"] for record in records] == ["GRPO", "DSRL"]
    assert [record["steps"]["step"] for record in records] == [[1, 2, 3, 4]] * 2
    assert records[1]["phases"] == [["NSR-PreRL", 1, 2], ["GRPO", 3, 4]]
    assert json.dumps(collect(file, tmp_path / "results")) == json.dumps(records)
    assert all(0 <= accuracy <= 1 for record in records for accuracy in record["steps"]["accuracy"])
    write_page(tmp_path / "results")
    assert "| DSRL | 1 |" in (tmp_path / "results" / "README.md").read_text()
