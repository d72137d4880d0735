"""Generate configs/README.md and the JSON schemas in configs/schemas from the configuration classes.

    python tools/write_config_reference.py

tests/configs/test_reference.py compares them with the classes.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

from megatron_dsrl.config.describe import (
    Place,
    choices_of,
    default_of,
    documentation,
    function_of,
    limits_of,
    meaning_of,
    sections_of,
    tags,
    type_of,
)
from megatron_dsrl.config.kinds import FILES, KINDS, Kind, as_text
from megatron_dsrl.config.registry import FunctionName, options_of
from megatron_dsrl.config.section import Section

REPOSITORY = Path(__file__).resolve().parents[1]

INTRODUCTION = """# Configuration reference

Every field of every configuration file. `python tools/write_config_reference.py` generates this page from the classes
in `megatron_dsrl/config/`, and a test compares the two. `dsrl config` gives the same information in the terminal:

```
dsrl config rollout.top_p                # one field: type, default, limits, meaning
dsrl config phases.loss                  # the choices and their options
dsrl config --kind sweep                 # a sweep file; also benchmark, eval and gradients
dsrl config --schema                     # the JSON schema of a run
```

Editors with YAML support (VS Code with the Red Hat YAML extension, Neovim, Emacs, JetBrains) complete and check files
as you type if they begin with

```yaml
# yaml-language-server: $schema=schemas/run.json
```

The path is relative to the file; for files outside the repository, save the output of `dsrl config --schema` and point
to it. [The README](../README.md#configuration) explains inheritance and command-line overrides.
"""

TITLES = {
    "run": "A run",
    "sweep": "A sweep",
    "benchmark": "A benchmark",
    "eval": "Overrides of an evaluation",
    "gradients": "Overrides of a gradient analysis",
}


def reference() -> str:
    """The whole page."""
    page = _Page()
    for name, kind in KINDS.items():
        page.add_kind(TITLES[name], kind)
    return "\n".join([INTRODUCTION, *page.lines])


class _Page:
    """Each field is described once: a section of the file itself under its own name, others where they come first.
    Other occurrences of a section link there."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._first: dict[tuple[type[Section], str], str] = {}
        """Class that defines a field, and the field's name: the heading of its table."""
        self._reserved: dict[type[Section], str] = {}
        """Sections of the file itself that have not been described yet, and their headings."""

    def add_kind(self, title: str, kind: Kind) -> None:
        """Add the chapter of one kind of file."""
        self.lines += [f"## {title}", "", f"{kind.where[0].upper()}{kind.where[1:]}.", ""]
        self._add_section(kind.section, "", title)

    def _add_section(self, section: type[Section], path: str, heading: str) -> None:
        here = {name: _definer(section, name) for name in section.model_fields if name not in _tag_field(section)}
        new = [name for name, definer in here.items() if (definer, name) not in self._first]
        known = [self._first[definer, name] for name, definer in here.items() if name not in new]
        self._first |= {(here[name], name): heading for name in new}
        if known:
            places = " and ".join(f"[`{place}`](#{_anchor(place)})" for place in dict.fromkeys(known))
            what = "The fields are those of" if not new else "Has fields of"
            self.lines += [f"{what} {places}{', and:' if new else '.'}", ""]
        if new:
            self.lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
            self.lines += [self._row(Place(name, section, section.model_fields[name])) for name in new]
            self.lines.append("")
        if not path:
            self._reserved = {below[0]: name for name in new if (below := self._to_describe(section, name))}
        for name in new:
            field = section.model_fields[name]
            below = sections_of(field)
            inner = f"{path}.{name}".lstrip(".")
            if choices_of(field) is not None or len(below) > 1:
                self._add_choices(inner, below)
            elif (function := function_of(field)) is not None:
                self._add_functions(inner, function)
            elif below and (self._reserved.get(below[0]) == inner or not self._is_known(below[0])):
                self._reserved.pop(below[0], None)
                self.lines += [f"### `{inner}`", "", documentation(below[0]), ""]
                self._add_section(below[0], inner, inner)

    def _row(self, place: Place) -> str:
        assert place.field is not None
        default = default_of(place.field)
        if default is None:
            shown = "required"
        elif default == "section" or default in ("{}", "[]"):
            shown = ""
        else:
            shown = f"`{default}`"
        limits = limits_of(place.field)
        kind = _cell(type_of(place.field) + (f", {limits}" if limits else ""))
        below = sections_of(place.field)
        if below and choices_of(place.field) is None and len(below) == 1 and self._is_known(below[0]):
            kind += f": as [`{self._heading_of(below[0])}`](#{_anchor(self._heading_of(below[0]))})"
        meaning = meaning_of(place).partition("\n\n")[0] if place.field.description is None else meaning_of(place)
        return f"| `{place.path}` | {kind} | {_cell(shown)} | {_cell(meaning)} |"

    def _to_describe(self, section: type[Section], name: str) -> list[type[Section]]:
        """The section that is a field of this one, if it has not been described; else none."""
        below = sections_of(section.model_fields[name])
        is_new = len(below) == 1 and choices_of(section.model_fields[name]) is None and not self._is_known(below[0])
        return below if is_new else []

    def _is_known(self, section: type[Section]) -> bool:
        return section in self._reserved or all(
            (_definer(section, name), name) in self._first for name in section.model_fields
        )

    def _heading_of(self, section: type[Section]) -> str:
        if section in self._reserved:
            return self._reserved[section]
        name = next(iter(section.model_fields))
        return self._first[_definer(section, name), name]

    def _add_choices(self, path: str, sections: list[type[Section]]) -> None:
        if all(choice in self._first for choice in ((section, "name") for section in sections)):
            return
        self._first |= {(section, "name"): path for section in sections}
        self.lines += [f"### `{path}`", "", "| name | meaning and options |", "|---|---|"]
        for section in sections:
            options = [name for name in section.model_fields if name != "name"]
            texts = [documentation(section), *(self._option(section, name) for name in options)]
            self.lines.append(f"| `{tags(section)[0]}` | {'<br>'.join(_cell(text) for text in texts)} |")
        self.lines.append("")

    def _option(self, section: type[Section], name: str) -> str:
        field = section.model_fields[name]
        facts = [f"default `{default_of(field)}`" if default_of(field) is not None else "required", limits_of(field)]
        return f"`{name}` ({type_of(field)}, {', '.join(filter(None, facts))}): {meaning_of(Place('', section, field))}"

    def _add_functions(self, path: str, function: FunctionName) -> None:
        self.lines += [f"### `{path}`", "", f"| {function.kind} | meaning and options |", "|---|---|"]
        for name, built_in in function.functions().items():
            texts = [documentation(built_in).partition("\n\n")[0]]
            for option in options_of(built_in):
                required = option.default is inspect.Parameter.empty
                texts.append(f"`{option.name}` ({'required' if required else f'default `{option.default}`'}): "
                             f"{option.meaning}")  # fmt: skip
            self.lines.append(f"| `{name}` | {'<br>'.join(_cell(text) for text in texts)} |")
        self.lines.append("")


def _tag_field(section: type[Section]) -> Iterator[str]:
    if tags(section):
        yield "name"


def _definer(section: type[Section], name: str) -> type[Section]:
    """The class that declares the field last."""
    return next(each for each in section.__mro__ if name in each.__dict__.get("__annotations__", {}))


def _anchor(heading: str) -> str:
    """The anchor that GitHub generates."""
    return heading.lower().replace(" ", "-").replace(".", "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n\n", " ").replace("\n", " ")


def generated() -> dict[Path, str]:
    """The generated files and their text."""
    configs = REPOSITORY / "configs"
    schemas = {configs / "schemas" / f"{kind}.json": as_text(KINDS[kind].schema()) for kind in FILES}
    return {configs / "README.md": reference(), **schemas}


def main() -> None:
    """Write all generated files and print their paths."""
    for file, text in generated().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
