"""The HTML report of a synthetic run: its figures are the logged ones, and it is self-contained and safe."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_dsrl.errors import UserError
from megatron_dsrl.observability.records import read_records
from megatron_dsrl.observability.report import write_report
from tests.observability.synthetic_run import HOSTILE_TEXT, evaluation_record, write_run

VOID_ELEMENTS = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements are balanced and collects what the tests look at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def charts(self) -> dict[str, dict]:
        """Chart data by the title that the alternative text begins with."""
        data = [json.loads(values["data-chart"]) for tag, values in self.elements if tag == "figure"]
        titles = [values["aria-label"].split(".")[0] for tag, values in self.elements if tag == "svg"]
        return dict(zip(titles, data, strict=True))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_run(folder, steps=12)
    return folder


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
        if name in {"src", "srcset", "action", "poster", "data", "xlink:href"} or (name == "href" and value != "data:,")
    ]
    assert references == []
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = next(values["content"] for tag, values in page.elements if "http-equiv" in values)
    assert policy.startswith("default-src 'none'")
    assert "http://" not in page.source and "https://" not in page.source


def test_hostile_text_of_a_response_is_only_text(page: Page) -> None:
    assert HOSTILE_TEXT in page.texts
    assert [tag for tag, _ in page.elements].count("script") == 1  # the page's own
    assert "img" not in [tag for tag, _ in page.elements]


def test_samples_of_first_middle_and_last_step_are_readable(page: Page) -> None:
    for step in (1, 7, 12):
        assert f"Step {step}" in page.texts
    assert "What is 0 + 0?" in page.text
    assert "truncated · -0.5 nat per token" in page.text


def test_configuration_is_in_the_page(page: Page, run_folder: Path) -> None:
    assert (run_folder / "config.yaml").read_text() in page.texts


def test_every_drawing_has_words_and_every_fold_a_summary(page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    assert all(values.get("aria-label") for tag, values in page.elements if tag == "svg")
    assert tags.count("details") == tags.count("summary") > 0


def test_a_run_that_is_still_going_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    write_run(tmp_path / "going", steps=3, planned=40)
    metrics = tmp_path / "going" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "pha')  # the writer is in the middle of a line
    text = Page(write_report(tmp_path / "going")).text
    assert "3 of 40 steps recorded" in text and "or it was interrupted" in text
    assert "25.0 ± 2.7 % before training only" in text
    assert "No step was in the post-train space" in text


def test_missing_pieces_are_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: fresh\nsteps: 5\n")
    text = Page(write_report(tmp_path)).text
    assert "No training step has been recorded yet." in text
    assert "No evaluation was recorded" in text and "No rollouts were saved" in text

    (tmp_path / "config.yaml").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "grpo", "reward/mean": null}\n')
    text = Page(write_report(tmp_path)).text
    assert "config.yaml is missing" in text and "No rewards were recorded." in text


def test_the_last_record_of_an_evaluated_step_wins(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=1)
    lines = [json.dumps(evaluation_record(0, accuracy)) + "\n" for accuracy in (0.1, 0.2)]
    (tmp_path / "run" / "evaluation.jsonl").write_text("".join(lines))
    assert Page(write_report(tmp_path / "run")).charts()["Held-out accuracy"]["series"] == [["20 ± 2.5"]]


def test_runs_side_by_side(run_folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", steps=5, learning_rate=1e-3)
    path = write_report(run_folder, tmp_path / "other", output=tmp_path / "both.html")
    page = Page(path)
    reward = page.charts()["Reward"]
    assert reward["steps"] == list(range(1, 13))
    assert [values[5:] == ["none"] * 7 for values in reward["series"]] == [False, True]
    assert "optimizer.learning_rate tiny 0.0003 other 0.001" in page.text


def test_a_folder_that_is_no_run_is_the_users_error(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="It contains the runs tiny"):
        write_report(run_folder.parent)
    (tmp_path / "config.yaml").write_text("steps: [")
    with pytest.raises(UserError, match="config.yaml is not valid YAML"):
        write_report(tmp_path)
