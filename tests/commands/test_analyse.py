"""`dsrl analyse` on run folders and evaluations on disk."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_dsrl.charts.charts import read_charts
from megatron_dsrl.cli import main
from megatron_dsrl.evaluation.metrics import summarise_benchmark
from megatron_dsrl.evaluation.results import write_results
from megatron_dsrl.evaluation.sample_file import ProblemResult, SampleFile
from megatron_dsrl.rollout.recording import read_groups, rollout_file
from tests.observability.synthetic_run import make_group, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_run(folder, steps=3, warmup=1)
    return folder


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["thoughts", "problems", "lengths"])
def test_a_run_is_analysed_into_its_folder(run, capsys, kind) -> None:
    assert main(["analyse", kind, str(run)]) == 0

    assert [record["step"] for record in records(run / "analysis" / f"{kind}.jsonl")] == [1, 2, 3]
    assert json.loads((run / "analysis" / f"{kind}.json").read_text())
    drawing = ElementTree.parse(run / "analysis" / f"{kind}.svg")
    assert any("phase-2" in (shape.get("class") or "") for shape in drawing.iter())  # phases are shaded
    assert read_charts(run / "analysis" / f"{kind}.charts.json")[0].source.phases
    assert f"analysis/{kind}.jsonl" in capsys.readouterr().out


def test_rollouts_without_training_are_analysed(run, tmp_path) -> None:
    """As `dsrl rollout` leaves them; a copy of a step's file does not count."""
    shutil.copytree(run / "rollouts", tmp_path / "rollouts")
    shutil.copy(tmp_path / "rollouts" / "step_000002.jsonl", tmp_path / "rollouts" / "step_000002_copy.jsonl")
    for kind in ("thoughts", "problems", "lengths"):
        assert main(["analyse", kind, str(tmp_path)]) == 0
        assert [record["step"] for record in records(tmp_path / "analysis" / f"{kind}.jsonl")] == [1, 2, 3]


def test_what_is_written_is_of_the_recorded_samples(run, tmp_path) -> None:
    main(["analyse", "lengths", str(run), "--steps", "2", "--output", str(tmp_path)])

    (record,) = records(tmp_path / "lengths.jsonl")
    tokens = [len(sample.response_ids) for group in read_groups(rollout_file(run, 2)) for sample in group.samples]
    assert record["mean_tokens"] == pytest.approx(sum(tokens) / len(tokens))


def test_thoughts_of_a_sample_file(tmp_path) -> None:
    group = make_group([1.0, 0.0], index=3, text="Wait.\n\nSo 6.")
    file = tmp_path / "samples" / "math.jsonl"
    with SampleFile(file, {"benchmark": {"temperature": 1.0}}) as samples:
        samples.add(ProblemResult.of_group(group))

    assert main(["analyse", "thoughts", str(file)]) == 0

    (record,) = records(tmp_path / "analysis" / "math" / "thoughts.jsonl")
    assert (record["responses"], record["reflections"], record["thoughts"]) == (2, 1.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["thoughts", "{run}", "--steps", "2,9"], "has no rollouts of step 9; it has 3 steps from 1 to 3"),
        (["problems", "{folder}"], "has no recorded rollouts"),
        (["problems", "{folder}/empty"], "empty: the recorded rollouts of these steps are empty"),
        (["thoughts", "{folder}/nothing"], "is neither a run folder nor a sample file"),
        (["pass-at-k", "{folder}"], "has no results.json"),
        (["behaviours", "{run}", "--url", "localhost", "--judge", "j"], "expected an address such as http://"),
        (["gradients", "{run}", "--model", "{folder}/nothing"], "no such folder:"),
        (["gradients", "{run}", "--model", "{folder}", "bos=im_end"], "bos: expected 'im_start'"),
        # before the model is read, which is not there
        (["gradients", "{run}", "--model", "{folder}", "--output", "{run}/config.yaml/x"], "x: Not a directory"),
    ],
)
def test_mistakes_end_in_one_message(run, tmp_path, capsys, arguments, message) -> None:
    filled = [argument.format(run=run, folder=tmp_path) for argument in arguments]
    (tmp_path / "empty" / "rollouts").mkdir(parents=True)
    (tmp_path / "empty" / "rollouts" / "step_000001.jsonl").touch()

    assert main(["analyse", *filled]) == 2
    assert message in capsys.readouterr().err


def evaluation(folder: Path, right: list[int], step: int | None = None) -> Path:
    """An evaluation of problems with 4 samples each; `right` of them are correct."""
    groups = [make_group([1.0] * count + [0.0] * (4 - count), index) for index, count in enumerate(right)]
    figures = summarise_benchmark([ProblemResult.of_group(group) for group in groups], answer_of=None)
    folder.mkdir(parents=True)
    write_results(folder, folder.name, {"amc23": {"title": "AMC23", **figures}}, step)
    return folder


def test_pass_at_k_of_two_evaluations_in_one_figure(tmp_path, capsys) -> None:
    grpo, dsrl = evaluation(tmp_path / "grpo", [4, 0]), evaluation(tmp_path / "dsrl", [2, 1])

    output = tmp_path / "figure"
    assert main(["analyse", "pass-at-k", f"GRPO={grpo}", str(dsrl), "--output", str(output)]) == 0

    values = {(r["evaluation"], r["k"]): r["pass_at_k"] for r in records(output / "pass_at_k.jsonl")}
    assert values["GRPO", 4] == values["GRPO", 1] == 0.5
    # 2 of 4: 1/2, 5/6, 1; 1 of 4: 1/4, 1/2, 1
    assert [values["dsrl", k] for k in (1, 2, 4)] == pytest.approx([3 / 8, 2 / 3, 1.0])
    table = (output / "pass_at_k.md").read_text()
    assert table == capsys.readouterr().out
    assert "| AMC23 | dsrl | 37.5 | 66.7 | 100.0 |" in table
    assert "AMC23" in (output / "pass_at_k.svg").read_text()
    assert main(["analyse", "pass-at-k", str(grpo), str(grpo), "--output", str(output)]) == 2


def test_a_label_with_several_runs_has_their_mean_and_interval(tmp_path) -> None:
    runs = [evaluation(tmp_path / name, right) for name, right in (("a", [4, 0]), ("b", [4, 1]))]
    assert main(["analyse", "pass-at-k", f"GRPO={runs[0]},{runs[1]}", "--output", str(tmp_path)]) == 0

    first = records(tmp_path / "pass_at_k.jsonl")[0]
    # 50 and 62.5 %: deviation 8.839 points, t(0.975, 1) = 12.706
    assert (first["k"], first["runs"], first["pass_at_k"]) == (1, 2, 0.5625)
    assert first["half_width_95"] == pytest.approx(12.7062 * 0.0883883 / 2**0.5, rel=1e-4)
    bars = [s for s in ElementTree.parse(tmp_path / "pass_at_k.svg").iter() if "bar" in (s.get("class") or "").split()]
    assert {bar.get("d").split(" ", 1)[1] for bar in bars} == {"194.0V22.0"}, "wider than 0 to 1, and cut off there"


def test_a_run_means_the_evaluation_of_its_latest_policy(tmp_path, capsys) -> None:
    for step, right in ((10, [0]), (2, [4])):
        evaluation(tmp_path / "run" / "evaluation" / f"step_{step:06d}", right, step)
    assert main(["analyse", "pass-at-k", str(tmp_path / "run"), "--output", str(tmp_path)]) == 0
    assert "| AMC23 | run | 0.0 |" in capsys.readouterr().out
