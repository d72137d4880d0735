"""The report as its readers meet it: in headless Chromium, on a narrow screen, with the keyboard, and on paper."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_dsrl.charts.chart_source import number
from megatron_dsrl.observability.records import read_records
from megatron_dsrl.report.report import write_report
from tests.observability.synthetic_run import write_run
from tests.support.browser import evaluate, needs_chromium, print_page

pytestmark = [pytest.mark.slow, needs_chromium]

HELPERS = """
const find = (title) => charts.find((chart) => chart.title === title);
const caption = (title) => find(title).figure.querySelector("figcaption").innerText.replace(/\\s+/g, " ").trim();
const press = (title, key) => find(title).svg.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const point = (title, share) => {
  const box = find(title).svg.getBoundingClientRect();
  const place = { clientX: box.left + share * box.width, clientY: box.top + 40, bubbles: true };
  find(title).svg.dispatchEvent(new PointerEvent("pointermove", place));
};
const cursors = () => charts.filter(({ svg }) => svg.querySelector(".cursor").getAttribute("visibility") === "visible");
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name, gain in (("DSRL", 0.35), ("GRPO", 0.2)):
        write_run(folder / name, steps=12, gain=gain)
    write_report(folder / "DSRL", output=folder / "run.html")
    write_report(folder / "DSRL", folder / "GRPO", output=folder / "comparison.html")
    return folder


def test_all_charts_show_the_values_of_the_step_under_one_cursor(folder: Path, tmp_path: Path) -> None:
    script = f"""{HELPERS}
    const at_first = caption("Reward");
    point("Reward", (58 + 330 * 6 / 11) / 400);
    const pointed = [caption("Reward"), caption("Response length"), caption("Held-out accuracy"), cursors().length];
    find("Reward").svg.dispatchEvent(new PointerEvent("pointerleave"));
    const left = [caption("Reward"), cursors().length];
    press("Reward", "Home");
    press("Reward", "ArrowRight");
    const pressed = [caption("Response length"), cursors().length, charts.length];
    return {{ at_first, pointed, left, pressed }};"""
    seen = evaluate(folder / "run.html", script, tmp_path)
    assert seen["errors"] == []
    records = read_records(folder / "DSRL" / "metrics.jsonl")

    def reward(step: int) -> str:
        return f"mean reward {number(records[step - 1]['reward/mean'])}"

    def length(step: int) -> str:
        record = records[step - 1]
        return f"mean tokens {number(record['response/mean_tokens'])} longest {record['response/max_tokens']}"

    assert seen["at_first"] == f"step 12 CSV {reward(12)}"
    assert seen["pointed"][:2] == [f"step 7 · grpo CSV {reward(7)}", f"step 7 · grpo CSV {length(7)}"]
    assert seen["pointed"][2] == "step 8 · grpo CSV held-out 48.3 ± 3.1", "the nearest evaluation"
    assert seen["left"] == [f"step 12 · grpo CSV {reward(12)}", 0]
    assert seen["pressed"] == [f"step 2 · nsr-prerl CSV {length(2)}", seen["pressed"][2], seen["pressed"][2]]


def test_values_read_the_same_with_and_without_the_script(folder: Path, tmp_path: Path) -> None:
    script = "return { words: [[0.68754], [1834.2], [2e-6], [-0.00851], [null], [3], [48.3, 3.1215], [0], [0.00012345]]"
    seen = evaluate(folder / "run.html", f"{script}.map(([value, error]) => inWords(value, error)) }};", tmp_path)
    values = [0.68754, 1834.2, 2e-6, -0.00851, None, 3, 48.3, 0, 0.00012345]
    assert seen["words"] == [number(value, 3.1215 if value == 48.3 else None) for value in values]


def test_curves_can_be_smoothed_and_downloaded(folder: Path, tmp_path: Path) -> None:
    script = f"""{HELPERS}
    const slider = document.querySelector(".smoothing input");
    const at_first = document.querySelectorAll(".trend").length;
    slider.value = 0.5; slider.dispatchEvent(new Event("input"));
    const trends = [...find("Loss").svg.querySelectorAll(".trend")].map((path) => path.getAttribute("d"));
    const accuracy = find("Held-out accuracy").svg.querySelectorAll(".trend").length;
    slider.value = 0; slider.dispatchEvent(new Event("input"));
    const made = [];
    URL.createObjectURL = (blob) => {{ made.push(blob); return "#"; }};
    find("Held-out accuracy").figure.querySelector(".csv").click();
    return {{ at_first, trends, accuracy, after: document.querySelectorAll(".trend").length,
      averages: average([1, null, 3], 0.5), csv: await made[0].text(), visible: slider.checkVisibility() }};"""
    seen = evaluate(folder / "run.html", script, tmp_path)
    assert seen["errors"] == [] and seen["visible"]
    assert (seen["at_first"], seen["accuracy"], seen["after"]) == (0, 0, 0)
    assert [path.count("L") for path in seen["trends"]] == [3, 7], "4 steps of the one space, 8 of the other"
    # (1/4 + 3/2) / (3/4) of the weights that have been given so far
    assert seen["averages"] == pytest.approx([1, None, (0.25 + 1.5) / 0.75])
    lines = seen["csv"].splitlines()
    assert lines[:2] == ["step,phase,held-out,held-out ±", "0,,25,2.70633"] and len(lines) == 5


@pytest.mark.parametrize("page", ["run.html", "comparison.html"])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_a_phone(folder: Path, tmp_path: Path, page: str, dark: bool) -> None:
    script = """document.querySelectorAll("details").forEach((details) => { details.open = true; });
    const style = getComputedStyle(document.body);
    return { width: document.documentElement.scrollWidth, colours: [style.color, style.backgroundColor] };"""
    seen = evaluate(folder / page, script, tmp_path, width=400, dark=dark)
    assert seen["errors"] == [] and seen["width"] == 400
    text, back = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in seen["colours"])
    assert (text > back) == dark


@dataclass(frozen=True)
class Line:
    """A line of text on paper, in points."""

    page: int
    left: float
    top: float
    right: float
    bottom: float
    text: str

    def overlaps(self, other: "Line") -> bool:
        """By more than what ascenders and descenders of neighbouring lines share."""
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        width = min(self.right, other.right) - max(self.left, other.left)
        return self.page == other.page and width > 1 and height > 0.4 * min(self.height, other.height)

    @property
    def height(self) -> float:
        return self.bottom - self.top


def lines_on_paper(pdf: Path) -> list[Line]:
    """Every line of text of a PDF file; axis names, which are turned, are left out."""
    command = ["pdftotext", "-bbox-layout", str(pdf), "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    document = ElementTree.fromstring(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "", text))
    space, lines = "{http://www.w3.org/1999/xhtml}", []
    for page_number, page in enumerate(document.iter(f"{space}page")):
        for line in page.iter(f"{space}line"):
            box = [float(line.get(side)) for side in ("xMin", "yMin", "xMax", "yMax")]
            words = " ".join(word.text or "" for word in line)
            if box[3] - box[1] < box[2] - box[0] or len(words) < 4:
                lines.append(Line(page_number, *box, words))
    return lines


@pytest.mark.parametrize("page", ["run.html", "comparison.html"])
def test_paper_holds_every_chart_in_one_piece_and_nothing_on_top_of_anything(
    folder: Path, tmp_path: Path, page: str
) -> None:
    lines = lines_on_paper(print_page(folder / page, tmp_path))
    overlapping = [(a.text, b.text) for i, a in enumerate(lines) for b in lines[:i] if a.overlaps(b)]
    assert overlapping == []
    words = " ".join(line.text for line in lines)
    assert "Smoothing" not in words and "Learning Policy" not in words and "CSV" not in words
    title, entry = {
        "run.html": ("Reward", "mean reward"),
        "comparison.html": ("Reward", "DSRL 0"),
    }[page]
    (above,) = [line for line in lines if line.text == title]
    below = [line for line in lines if line.text.startswith(entry) and line.page == above.page and line.top > above.top]
    assert below, "title and caption of a chart are on one page"


def test_swatches_keep_their_colour_on_paper(folder: Path, tmp_path: Path) -> None:
    pdf = print_page(folder / "run.html", tmp_path)
    (entry,) = [line for line in lines_on_paper(pdf) if line.text.startswith("held-out 60")]
    box = ["-x", str(int(entry.left) - 12), "-y", str(int(entry.top)), "-W", "12", "-H", str(int(entry.height))]
    numbers = ["-f", str(entry.page + 1), "-l", str(entry.page + 1), "-r", "72"]
    picture = subprocess.run(["pdftoppm", *numbers, *box, str(pdf)], capture_output=True, check=True).stdout
    pixels = picture.split(b"\n", 3)[3]
    assert any(pixels[i] < 60 and pixels[i + 2] > 140 for i in range(0, len(pixels) - 2, 3)), "the blue of series 1"
