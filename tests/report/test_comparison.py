"""Methods over several runs: tests against hand-worked numbers, and the files. And the learning curve of one run: one
SVG file that names its curves, axes and phases, and cuts nothing off."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_dsrl.cli import main
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.report.comparison import welch_p_value, write_comparison, write_learning_curve
from tests.observability.synthetic_run import start_record, write_run, write_starts

SVG = "{http://www.w3.org/2000/svg}"
GAINS = {"GRPO": (0.30, 0.35, 0.40), "DSRL": (0.40, 0.45, 0.50)}


@pytest.fixture
def methods(tmp_path) -> dict[str, list[Path]]:
    folders: dict[str, list[Path]] = {}
    for method, gains in GAINS.items():
        for seed, gain in enumerate(gains):
            folders.setdefault(method, []).append(tmp_path / f"{method}_{seed}")
            write_run(folders[method][-1], gain=gain)
    return folders


def test_welchs_p_value() -> None:
    # t = 0.1 / sqrt(2 * 0.0025 / 3) = 2.44949 with 4 degrees of freedom: p = 0.07048
    assert welch_p_value((0.55, 0.60, 0.65), (0.65, 0.70, 0.75)) == pytest.approx(0.07048, abs=1e-5)
    assert welch_p_value((0.5,), (0.6, 0.7)) is None and welch_p_value((0.5, 0.5), (0.6, 0.6)) is None


def test_table_and_figure_of_several_runs_per_method(methods, tmp_path) -> None:
    table = write_comparison(methods, "GRPO", tmp_path)
    assert (tmp_path / "comparison.md").read_text() == table
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:5]]
    rows = {method: values for method, *values in cells}
    assert rows["before training"][:2] == ["", "25.0"]
    assert rows["GRPO"][:3] == ["3", "60.0 ± 12.4", ""]
    assert rows["DSRL"][:3] == ["3", "70.0 ± 12.4", "0.07"]
    figure = ElementTree.parse(tmp_path / "comparison.svg").getroot()
    texts = figure.iter("{http://www.w3.org/2000/svg}text")
    titles = [text.text for text in texts if text.get("class") == "title"]
    assert titles == ["GRPO", "DSRL"]
    lines = re.findall('class="line (series-.)"', (tmp_path / "comparison.svg").read_text())
    assert lines == ["series-6", "series-6", "series-1"], "the baseline has one colour in all charts"


def test_the_command_says_where_it_has_written(methods, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    named = [f"{method}={','.join(path.name for path in folders)}" for method, folders in methods.items()]
    assert main(["compare", *named]) == 0
    table, written = capsys.readouterr().out.rsplit("\n\n", 1)
    assert written == "written to runs/comparison/comparison.md and runs/comparison/comparison.svg\n"
    assert (tmp_path / "runs/comparison/comparison.md").read_text().strip() == table.strip()
    assert [path.name for path in tmp_path.glob("comparison*")] == [], "nothing beside the user's own files"


def test_what_produced_the_runs_is_beside_their_results(methods, tmp_path) -> None:
    assert "produced by" not in write_comparison(methods, "GRPO", tmp_path)
    for folder in (*methods["GRPO"], *methods["DSRL"][:2]):
        write_starts(folder, start_record())
    write_starts(methods["DSRL"][2], start_record(python="3.11.7 CPython (/usr/bin/python)"))
    table = write_comparison(methods, "GRPO", tmp_path)
    assert "| produced by | all runs |" in table
    assert "| Commit | cccccccccccc |" in table
    assert table.endswith(
        "| differs | Python |\n| --- | --- |\n| GRPO | 3.12.3 CPython |\n| DSRL | 3.12.3 CPython; 3.11.7 CPython |\n"
    )
    methods["DSRL"][0].joinpath("provenance.jsonl").unlink()
    table = write_comparison(methods, "GRPO", tmp_path)
    (header, _, grpo, dsrl) = table.splitlines()[-4:]
    assert header.startswith("| differs | Commit |")
    assert grpo.startswith("| GRPO | cccccccccccc |") and dsrl.startswith("| DSRL | not recorded; cccccccccccc |")


def test_every_set_has_its_own_test(methods, tmp_path) -> None:
    for gain, folder in zip((0.0, 0.1, 0.2) * 2, (*methods["GRPO"], *methods["DSRL"]), strict=True):
        with open(folder / "evaluation.jsonl", "a") as stream:
            stream.write(json.dumps({"set": "other", "step": 6, "accuracy": 0.5 + gain}) + "\n")
    table = write_comparison(methods, "GRPO", tmp_path)
    header, _, _, grpo, dsrl = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[:5])
    tests = [number for number, title in enumerate(header) if title.startswith("p against GRPO on ")]
    assert [header[number].removeprefix("p against GRPO on ") for number in tests] == ["held-out", "other"]
    assert [grpo[number] for number in tests] == ["", ""]
    assert [dsrl[number] for number in tests] == ["0.07", "1"]


def test_what_some_runs_have_not_measured_is_left_out(methods, tmp_path) -> None:
    """Another set, more samples since some step, a run that has only begun, a supervised one, a null."""
    grpo, other, begun = methods["GRPO"]
    with open(grpo / "evaluation.jsonl", "a") as stream:
        for accuracy in (0.5, None):
            record = {"set": "other", "step": 12, "accuracy": accuracy, "samples_per_prompt": 4, "pass@4": 0.9}
            stream.write(json.dumps(record) + "\n")
    with open(other / "evaluation.jsonl", "a") as stream:
        record = {"set": "held-out", "step": 12, "accuracy": 0.5, "samples_per_prompt": 4, "pass@4": 0.8}
        stream.write(json.dumps(record) + "\n")
    for file in ("evaluation.jsonl", "metrics.jsonl"):
        (begun / file).write_text("")
    (methods["DSRL"][0] / "metrics.jsonl").write_text('{"step": 1, "phase": "SFT", "space": "post_train"}\n')
    table = write_comparison(methods, "GRPO", tmp_path)
    header, _, before, *_ = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[:5])
    assert before[header.index("pass@4 on held-out, %")] == ""


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["GRPO=GRPO_0", "GRPO=GRPO_1"], "`GRPO=GRPO_1`: GRPO is named twice; write LABEL=FOLDER,FOLDER"),
        (["GRPO="], "`GRPO=`: GRPO has no folder; write"),
        (["GRPO=GRPO_0,GRPO_0"], "GRPO_0 is named twice, and would count as two runs; remove one"),
        (["GRPO_0", "DSRL=nowhere"], "No such folder: nowhere"),
    ],
)
def test_a_mistake_in_the_labels_is_named(methods, tmp_path, monkeypatch, capsys, named, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *named]) == 2
    assert message in capsys.readouterr().err


def test_runs_without_evaluations_are_refused(methods, tmp_path) -> None:
    for folder in methods["GRPO"]:
        (folder / "evaluation.jsonl").unlink()
    with pytest.raises(UserError, match="no evaluations"):
        write_comparison({"GRPO": methods["GRPO"]}, "GRPO", tmp_path)


def texts(path: Path) -> list[str]:
    """All texts of a picture, in the drawing's order."""
    return [text.text or "" for text in ElementTree.parse(path).getroot().iter(f"{SVG}text")]


def test_the_command_writes_one_picture_with_curves_axes_and_phases_named(tmp_path: Path, capsys) -> None:
    write_run(tmp_path / "tiny", steps=48, warmup=5)
    picture = tmp_path / "pictures" / "curve.svg"
    assert main(["report", str(tmp_path / "tiny"), "--figure", str(picture)]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    assert not (tmp_path / "tiny" / "report.html").exists()
    words = texts(picture)
    assert words[0] == "tiny" and {"step", "accuracy", "nsr-prerl", "grpo", "0", "48"} < set(words)
    assert {"step 48:", "accuracy on held-out: 0.6 ± 0.031"} < set(words)
    assert any(text.startswith("reward of the samples: 0.") for text in words)
    bands = [rect for rect in ElementTree.parse(picture).getroot().iter(f"{SVG}rect") if "band" in rect.get("class")]
    assert len(bands) == len({band.get("class") for band in bands}) == 2
    source = picture.read_text()
    assert "prefers-color-scheme: dark" in source and "url(" not in source and "href" not in source


def test_a_run_between_two_evaluations_shows_the_last_one(tmp_path: Path) -> None:
    write_run(tmp_path / "going", steps=6, planned=40)
    words = texts(write_learning_curve(tmp_path / "going", tmp_path / "curve.svg"))
    assert {"step 6:", "accuracy on held-out: 0.483 ± 0.031 at step 4"} < set(words)


def test_rewards_beyond_an_accuracy_do_not_share_its_axis(tmp_path: Path) -> None:
    records = write_run(tmp_path / "run", steps=4)
    lines = [json.dumps(record | {"reward/mean": -3.0}) + "\n" for record in records]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    assert not any("reward" in text for text in texts(write_learning_curve(tmp_path / "run", tmp_path / "a.svg")))
    (tmp_path / "run" / "evaluation.jsonl").unlink()
    alone = texts(write_learning_curve(tmp_path / "run", tmp_path / "b.svg"))
    assert {"reward", "-3", "reward of the samples: -3"} < set(alone)


def test_a_run_without_a_curve_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: fresh\n")
    with pytest.raises(UserError, match="no evaluation and no reward yet"):
        write_learning_curve(tmp_path, tmp_path / "curve.svg")
    assert main(["report", str(tmp_path), str(tmp_path), "--figure", str(tmp_path / "curve.svg")]) == 2
