"""HTML pages of reports, as tests read them."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from megatron_dsrl.charts.chart_source import number

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

    def rows(self) -> list[list[str]]:
        """Cells of all table rows."""
        rows = re.findall("<tr>(.*?)</tr>", self.source, re.DOTALL)
        return [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def charts(self) -> dict[str, dict]:
        """By title: steps, the phase of each, and the values of every series as people read them."""
        return {data["title"]: _in_words(data) for data in self.chart_data()}

    def chart_data(self) -> list[dict]:
        """What the page's script reads."""
        return [json.loads(values["data-chart"]) for tag, values in self.elements if tag == "figure"]


def _in_words(data: dict) -> dict:
    steps = data["steps"]
    steps = list(range(steps["from"], steps["to"] + 1)) if isinstance(steps, dict) else steps
    phases = [next((name for name, first, last in data["phases"] if first <= step <= last), "") for step in steps]
    series = [list(map(number, one["values"], one.get("errors", [None] * len(steps)))) for one in data["series"]]
    return {"steps": steps, "phases": phases, "series": series, "names": [one["name"] for one in data["series"]]}
