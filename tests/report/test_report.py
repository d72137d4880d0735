"""The HTML report of a synthetic run: it shows what is in the run folder, and is self-contained and safe."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dsrl.cli import main
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.text import visible
from megatron_dsrl.evaluation.metrics import summarise_benchmark
from megatron_dsrl.evaluation.results import write_results
from megatron_dsrl.evaluation.sample_file import ProblemResult, SampleFile
from megatron_dsrl.observability.records import read_records
from megatron_dsrl.report.report import write_report
from tests.observability.synthetic_run import (
    CONTROL_CHARACTERS,
    HOSTILE_TEXT,
    evaluation_record,
    make_group,
    start_record,
    write_run,
    write_starts,
)
from tests.support.pages import Page


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_run(folder, steps=12)
    write_evaluation(folder / "evaluation" / "step_000012", right=[4, 1], step=12)
    write_evaluation(folder / "evaluation" / "step_000004", right=[2, 0], step=4)
    for analysis in (["problems", folder], ["thoughts", folder / "evaluation/step_000012/samples/amc23.jsonl"]):
        assert main(["analyse", *map(str, analysis)]) == 0
    write_starts(folder, *STARTS)
    for log, text in LOGS.items():
        (folder / log).parent.mkdir(exist_ok=True)
        (folder / log).write_text(text, newline="")
    return folder


STARTS = (
    start_record(),
    start_record(after_step=8, hosts=["node2"], slurm={"job_id": "17", "restart_count": "1"}),
    start_record(
        after_step=8,
        world_size=4,
        slurm={"job_id": "18"},
        code=start_record()["code"] | {"dirty": True, "diff_sha256": "9" * 64},
        packages=start_record()["packages"] | {"torch": "2.15.0"},
        device=start_record()["device"] | {"names": ["H100"] * 4},
    ),
)
"""The second one died before its first step."""

FREEZE_GC = """[2026-01-01 10:00:01] post-warmup freeze_gc failed
Traceback (most recent call last):
  File "connectionpool.py", line 793, in urlopen
    response = self._make_request(
ConnectionRefusedError: [Errno 111] Connection refused

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "http_server.py", line 2561, in _freeze_gc_after_server_warmup
requests.exceptions.ConnectionError: Max retries exceeded with url: /freeze_gc
"""
LOGS = {
    "engines/engine_0.log": "[2026-01-01 10:00:00] Ignore import error when loading sglang.srt.models.grok: no kernel\n"
    "[2026-01-01 10:00:00] Ignore import error when loading sglang.srt.models.midashenglm: torchaudio\n"
    + FREEZE_GC
    + "[2026-01-01 10:00:02] scheduler died\nTraceback (most recent call last):\n"
    '  File "scheduler.py", line 7, in run\nRuntimeError: <b>out of memory</b>\n',
    "slurm/job_7_attempt_1.log": "x" * 100_000 + "\n10 %\r20 %\r\x1b[32m100 %\x1b[0m\r\n<b>done</b>\n",
}


def write_evaluation(folder: Path, right: list[int], step: int) -> None:
    """Write the results of `dsrl eval`: problems with 4 samples each, and the number of right ones for each."""
    groups = [make_group([1.0] * count + [0.0] * (4 - count), index) for index, count in enumerate(right)]
    problems = [ProblemResult.of_group(group) for group in groups]
    with SampleFile(folder / "samples" / "amc23.jsonl", {}) as samples:
        for problem in problems:
            samples.add(problem)
    summary = {"title": "AMC23", **summarise_benchmark(problems, None)}
    write_results(folder, "hf", {"amc23": summary}, step)


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Page:
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    return Page(path)


def test_charts_hold_the_logged_values_and_phases(page: Page, run_folder: Path) -> None:
    records = read_records(run_folder / "metrics.jsonl")
    charts = page.charts()

    def column(key: str) -> list[str]:
        values = [record.get(key) for record in records]
        return ["none" if v is None else f"{v:.3g}" if v and abs(v) >= 1e-3 else f"{v:g}" for v in values]

    assert charts["Reward"]["series"] == [column("reward/mean")]
    assert charts["Reward"]["steps"] == list(range(1, 13))
    assert charts["Reward"]["phases"] == ["nsr-prerl"] * 4 + ["grpo"] * 8
    assert charts["Solved, mixed and unsolved prompts"]["series"] == [
        column("reward/solved_groups"), column("reward/mixed_groups"), column("reward/unsolved_groups"),
    ]  # fmt: skip
    assert charts["Log-prob gap to the engine"]["series"] == [["none"] * 4 + ["2e-6"] * 8, ["none"] * 4 + ["9e-6"] * 8]
    assert charts["Seconds per part"]["series"][1] == ["2.5"] * 12
    assert charts["Seconds per part"]["series"][3] == ["0.2"] * 12  # other: step - generate - train - push
    assert charts["Held-out accuracy"]["steps"] == [0, 4, 8, 12]
    assert charts["Held-out accuracy"]["series"] == [["25 ± 2.7", "36.7 ± 3", "48.3 ± 3.1", "60 ± 3.1"]]


def test_a_figure_that_changes_its_meaning_is_not_one_curve(page: Page) -> None:
    data = {chart["title"]: chart for chart in page.chart_data()}
    loss = page.charts()["Loss"]
    assert loss["names"] == ["loss of log P(y)", "loss of log P(y|x)"]
    assert [[value == "none" for value in one] for one in loss["series"]] == [
        [False] * 4 + [True] * 8,
        [True] * 4 + [False] * 8,
    ]
    assert all(one["breaks"] == [5] for one in data["Loss"]["series"] + data["Gradient norm"]["series"])
    entropy = page.charts()["Entropy of P(y|x)"]
    assert entropy["names"] == ["sampled", "trained"]
    assert "none" not in entropy["series"][0] and entropy["series"][1][:5].count("none") == 4
    assert page.charts()["Entropy of P(y)"]["series"][0][3:5].count("none") == 1
    assert data["Log-prob gap to the engine"]["y"]["log"] == 10, "mean and maximum are both visible"


def test_headline_says_accuracy_with_its_errors_and_problems(page: Page) -> None:
    # Standard error of the difference: sqrt(2.706^2 + 3.062^2) = 4.087 points.
    assert "25.0 ± 2.7 % → 60.0 ± 3.1 %" in page.text
    assert "+35.0 points = +8.6 standard errors; 256 problems × 1 sample" in page.text
    assert "Complete: all 12 steps" in page.text
    assert "models/qwen3-tiny" in page.text and "TP 2 · PP 1" in page.text


def test_the_page_needs_nothing_else(page: Page) -> None:
    references = [
        (tag, name, value)
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if name in {"src", "srcset", "action", "poster", "data", "xlink:href"}
        or (name == "href" and value != "data:," and not value.startswith("#"))
    ]
    assert references == []
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = next(values["content"] for tag, values in page.elements if "http-equiv" in values)
    assert policy.startswith("default-src 'none'")
    targets = {values["href"] for tag, values in page.elements if tag == "a"}
    assert targets <= {"#" + values["id"] for _, values in page.elements if "id" in values}


def test_hostile_text_of_a_response_is_only_text(page: Page) -> None:
    assert visible(HOSTILE_TEXT) in page.texts
    assert r"\x00\x1b\u202e" in page.source and not set(CONTROL_CHARACTERS) & set(page.source)
    assert [tag for tag, _ in page.elements].count("script") == 1  # the page's own
    assert "img" not in [tag for tag, _ in page.elements]


def test_samples_of_first_middle_and_last_step_are_readable(page: Page) -> None:
    for step in (1, 7, 12):
        assert f"Step {step}" in page.texts
    assert "What is 0 + 0?" in page.text
    assert "truncated · -0.5 nats per token" in page.text


def test_evaluations_are_shown_by_step_and_beside_the_paper(page: Page) -> None:
    rows = page.rows()
    # Problems with 4 and 1 of 4 right: Avg@4 = 5/8, Pass@4 = 1; with 2 and 0: 1/4 and 1/2.
    assert ["AMC23", "step 4", "2", "4", "25.0", "0.0 to 50.0", "50.0", "", "3", "0.0 %", "0"] in rows
    assert ["AMC23", "step 12", "2", "4", "62.5", "25.0 to 100.0", "100.0", "", "3", "0.0 %", "0"] in rows
    assert ["Qwen3-4B, paper", "41.26", "55.79", "54.38", "57.54", ""] in rows
    curves = page.charts()["AMC23: Pass@K"]
    assert curves["steps"] == [1, 2, 4]
    assert curves["series"] == [["0.25", "0.417", "0.5"], ["0.625", "0.75", "1"]]


def test_analyses_of_the_run_and_of_an_evaluation_are_there(page: Page, run_folder: Path) -> None:
    summary = json.loads((run_folder / "analysis" / "problems.json").read_text())
    assert f"Solved at least once {summary['solved_at_least_once']}" in page.text
    assert page.charts()["Solved at least once"]["steps"] == list(range(1, 13))
    assert "Transition and reflection thoughts on amc23 (step_000012)" in page.texts
    assert ["1", "8"] in [row[:2] for row in page.rows()], "8 problems in epoch 1"


def test_logs_show_warnings_and_errors(page: Page) -> None:
    (engine,) = [text for text in page.texts if "scheduler died" in text]
    assert engine.split("\n") == [
        "[2026-01-01 10:00:02] scheduler died",
        "Traceback (most recent call last):",
        '  File "scheduler.py", line 7, in run',
        "RuntimeError: <b>out of memory</b>",
    ]
    assert "freeze_gc" not in page.source and "torchaudio" not in page.source
    assert "models of other families that this machine cannot load (2)" in page.text
    assert "freeze garbage collection before its port is open (1)" in page.text
    assert "engines/engine_0.log 1 warning or error SGLang server" in page.text
    assert "slurm/job_7_attempt_1.log no warnings or errors SLURM job" in page.text
    (job,) = [text for text in page.texts if "100 %\n" in text]
    assert job.split("\n") == ["x" * 300 + " …", "100 %", "<b>done</b>"]


def test_where_the_time_went(page: Page, run_folder: Path) -> None:
    records = read_records(run_folder / "metrics.jsonl")
    whole = sum(record["seconds/step"] for record in records)
    share = 100 * sum(record["seconds/train"] for record in records) / whole
    assert ["train", "2.50", "2.50", "2.50", f"{share:.0f} %"] in page.rows()
    assert ["the whole step", "100 %"] in [[row[0], row[-1]] for row in page.rows() if row]


def test_other_recorded_figures_have_charts_too(page: Page, run_folder: Path) -> None:
    recorded = {key for record in read_records(run_folder / "metrics.jsonl") for key in record}
    charts = page.charts()
    assert charts["mismatch/kl_k3"]["series"] == [["none"] * 4 + ["1e-12"] * 8]
    assert {title for title in charts if "/" in title} < recorded


def test_configuration_is_in_the_page(page: Page, run_folder: Path) -> None:
    assert (run_folder / "config.yaml").read_text() in page.texts


def test_every_start_is_shown_and_what_changed_between_them(page: Page) -> None:
    assert STARTS[0]["packages"]["torch"] == "2.14.1"
    rows = page.rows()
    device = "8 × H100, CUDA 13.0, driver 580.95.05"
    assert ["2026-09-21 13:33 UTC", "1 to 8", "cccccccccccc", "8", device, "node1", "job 17"] in rows
    assert ["2026-09-21 13:33 UTC", "none", "cccccccccccc", "8", device, "node2", "job 17, restart 1"] in rows
    last = "cccccccccccc with changes 999999999999"
    assert ["2026-09-21 13:33 UTC", "9 to 12", last, "4", device.replace("8", "4", 1), "node1", "job 18"] in rows
    assert ["Commit", "cccccccccccc", last, "9"] in rows and ["Package torch", "2.14.1", "2.15.0", "9"] in rows
    assert "Base model" not in [row[0] for row in rows], "it is the same in all starts"
    assert "Qwen/Qwen3-8B at bbbbbbbbbbbb, fingerprint ffffffffffff" in page.texts
    assert "TP 2, sequence parallel" in page.texts


def test_every_drawing_has_words_and_every_fold_a_summary(page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    assert all(values.get("aria-label") for tag, values in page.elements if tag == "svg")
    assert tags.count("details") == tags.count("summary") > 0


def test_a_run_that_is_still_going_is_reported_so_far(tmp_path: Path) -> None:
    write_run(tmp_path / "going", steps=3, planned=40)
    metrics = tmp_path / "going" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "pha')  # the writer is in the middle of a line
    text = Page(write_report(tmp_path / "going")).text
    assert "3 of 40 steps recorded" in text and "or it was interrupted" in text
    assert "25.0 ± 2.7 % before training only" in text
    assert "Log-prob gap to the engine: no step was in the post-train space" in text


def test_missing_parts_are_described_in_words(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: fresh\nsteps: 5\n")
    text = Page(write_report(tmp_path)).text
    assert "No training step has been recorded yet." in text
    assert "No evaluation was recorded" in text and "No rollouts were saved" in text
    assert "No benchmark was evaluated" in text and "Nothing was analysed" in text and "has no logs of engines" in text
    assert "provenance.jsonl is missing" in text

    (tmp_path / "config.yaml").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "grpo", "time": 0, "reward/mean": null}\n')
    text = Page(write_report(tmp_path)).text
    assert "config.yaml is missing" in text and "Reward: nothing was recorded." in text


def test_the_last_record_of_an_evaluated_step_wins(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=1)
    lines = [json.dumps(evaluation_record(0, accuracy)) + "\n" for accuracy in (0.1, 0.2)]
    (tmp_path / "run" / "evaluation.jsonl").write_text("".join(lines))
    assert Page(write_report(tmp_path / "run")).charts()["Held-out accuracy"]["series"] == [["20 ± 2.5"]]


def test_runs_side_by_side(run_folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", steps=5, learning_rate=1e-3)
    write_starts(tmp_path / "other", start_record())
    path = write_report(run_folder, tmp_path / "other", output=tmp_path / "both.html")
    page = Page(path)
    reward = page.charts()["Reward"]
    assert reward["steps"] == list(range(1, 13))
    assert [values[5:] == ["none"] * 7 for values in reward["series"]] == [False, True]
    rows = [[re.sub("<[^>]*>", " ", cell).split() for cell in row] for row in page.rows()]
    assert [["optimizer.learning_rate"], ["0.0003"], ["0.001"]] in rows
    assert [["Steps"], ["12", "of", "12"], ["5", "of", "5"]] in rows
    (accuracy,) = [row for row in rows if row[0] == ["Accuracy", "on", "held-out"]]
    assert [cell[0:6:5] for cell in accuracy[1:]] == [["25.0", "60.0"], ["25.0", "53.0"]], accuracy
    assert page.source.index("optimizer.learning_rate") < page.source.index("<figure"), "before the first chart"
    assert page.source.index("<figure") < page.source.index('id="provenance"')
    held_out = [data for data in page.chart_data() if data["title"] == "Accuracy on held-out"]
    assert [one["name"] for data in held_out for one in data["series"]] == ["tiny", "other"]
    colours = re.findall('class="line (series-.)"', page.source)
    assert set(zip(colours[::2], colours[1::2])) == {("series-2", "series-1")}, "a run has one colour in all charts"
    changed = "tiny cccccccccccc, then cccccccccccc with changes 999999999999 other cccccccccccc"
    assert f"Commit differs {changed}" in page.text
    assert "Package numpy" not in page.text and "Python 3.12.3" in page.text
    assert "Package torch differs tiny 2.14.1, then 2.15.0 other 2.14.1" in page.text
    assert ["AMC23", "tiny"] in [row[:2] for row in page.rows()]


def test_a_folder_that_is_not_a_run_is_a_user_error(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such folder:"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="It contains the runs tiny"):
        write_report(run_folder.parent)
    (tmp_path / "config.yaml").write_text("steps: [")
    with pytest.raises(UserError, match="config.yaml is not valid YAML"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("evaluation/results.json", "does not hold the results of `dsrl eval`"),
        ("analysis/thoughts.json", "is not the summary of an analysis"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text("name: damaged\n")
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text("[1, 2")
    with pytest.raises(UserError, match=f"{file} {message}"):
        write_report(tmp_path)


def test_a_report_is_made_without_pytorch(run_folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from megatron_dsrl.cli import main\n"
        f"assert main(['report', {str(run_folder)!r}, '--output', {str(tmp_path / 'page.html')!r}]) == 0\n"
        "assert not {'torch', 'sglang', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
