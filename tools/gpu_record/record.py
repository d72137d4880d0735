"""The record of a machine: what was tried, what became of it, and the figures; as JSON and as Markdown."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Status = Literal["passed", "failed", "skipped"]
COLOURS = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
ON_CPU = "This ran on a CPU. It tries out the script and says nothing about GPUs."


@dataclass(frozen=True)
class Result:
    """One stage of the first run, or one part of the probe."""

    name: str
    purpose: str
    """What it proves or measures."""
    status: Status
    seconds: float = 0.0
    reason: str | None = None
    """Why it failed or was skipped."""
    figures: Mapping[str, str] = field(default_factory=dict)
    output: Sequence[str] = ()
    """Lines of its output that belong in the record."""
    command: str | None = None


@dataclass
class Record:
    """All results on one machine, saved after every one of them."""

    title: str
    folder: Path
    machine: dict[str, str]
    on_cpu: bool
    results: list[Result] = field(default_factory=list)

    @property
    def markdown_file(self) -> Path:
        """The record as a page; the other file holds the same as JSON."""
        return self.folder / "record.md"

    @property
    def failed(self) -> list[Result]:
        """Results of parts that ended with an error."""
        return [result for result in self.results if result.status == "failed"]

    def add(self, result: Result) -> None:
        """Add a result, replacing an earlier one of the same name, and save both files."""
        names = [other.name for other in self.results]
        place = names.index(result.name) if result.name in names else len(names)
        self.results[place : place + 1] = [result]
        self.save()

    def save(self) -> None:
        """Write `record.json` and `record.md`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _file(self.folder).write_text(json.dumps(_as_json(self), indent=2, ensure_ascii=False), encoding="utf-8")
        self.markdown_file.write_text("\n".join(markdown(self)), encoding="utf-8")

    def take_earlier_results(self) -> None:
        """Start with the results of an earlier call in the same folder, if it was for the same commit and device."""
        if not _file(self.folder).is_file():
            return
        earlier = json.loads(_file(self.folder).read_text(encoding="utf-8"))
        if all(earlier["machine"].get(key) == self.machine.get(key) for key in ("commit", "device")):
            self.results = [Result(**result) for result in earlier["results"]]


def markdown(record: Record) -> list[str]:
    """The record as lines of Markdown."""
    lines = [f"# {record.title}", ""] + ([f"**{ON_CPU}**", ""] if record.on_cpu else [])
    lines += [f"- {name}: {value}" for name, value in record.machine.items()] + [""]
    lines += ["| | result | s | |", "|---|---|---|---|"]
    lines += [
        f"| {each.name} | {each.status} | {each.seconds:.0f} | {each.reason or each.purpose} |"
        for each in record.results
    ]
    for each in record.results:
        if each.figures or each.output:
            lines += ["", f"## {each.name}: {each.purpose}", ""] + ([f"`{each.command}`", ""] if each.command else [])
        if each.figures:
            lines += ["| figure | value |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in each.figures.items()]
        if each.output:
            lines += ["", "```", *each.output, "```"]
    return [*lines, ""]


def print_tables(record: Record, console: Console) -> None:
    """Print the results, then the figures of each."""
    table = Table("", "result", "s", "", box=None, header_style="bold")
    for each in record.results:
        status = f"[{COLOURS[each.status]}]{each.status}[/]"
        table.add_row(each.name, status, f"{each.seconds:.0f}", each.reason or each.purpose)
    console.print(table)
    for each in record.results:
        if each.figures:
            figures = Table(each.name, "", box=None, header_style="bold")
            for name, value in each.figures.items():
                figures.add_row(f"  {name}", value)
            console.print(figures)


def _file(folder: Path) -> Path:
    return folder / "record.json"


def _as_json(record: Record) -> dict[str, Any]:
    return {
        "title": record.title,
        "on_cpu": record.on_cpu,
        "machine": record.machine,
        "results": [dataclasses.asdict(result) for result in record.results],
    }
