"""From YAML files and command-line overrides to a RunConfig, and back.

A run may be several files, `dsrl train size.yaml method.yaml`: the later one wins, and the run is named after them,
`size_method`, unless one of them sets `name`. A file may name a parent, `inherits: ../base.yaml`, or several,
`inherits: [size.yaml, method.yaml]`, relative to the file itself; again the later one wins. A parent that several
files share, or that is itself one of the earlier files, is read once, where it comes first, so that it does not undo
what was laid over it.

Sections are merged key by key, the nearer file winning; lists (such as `phases`) and single values replace. A choice by
name with another name, `loss: {name: gspo}` over `{name: dual_clip, clip_high: 0.28}`, replaces the whole: the options
belong to the other choice. A section in place of a list changes the items at the positions that are its keys:
`phases: {0: {until_step: 5}}`. Overrides come last: `rollout.temperature=0.7`, `phases.0.until_step=5`; the value is
YAML, an empty one is null, a template (`{{ x }}`) is taken as text, and a section or list given as a value replaces the
whole. Paths inside the configuration (`model.path`, `data.source`, `output_dir`) are left as they are, relative to the
current directory of the process.

Every mistake ends in one UserError that lists each wrong field: its path, the file and line (or the override) that set
it, what was wrong, and the value.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dsrl.common.disk import replace_text
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.engine_numerics import with_correction
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.config.validate import validated
from megatron_dsrl.config.yaml_text import KeyPath, format_yaml, parse_yaml, read_text

INHERITS = "inherits"
TEMPLATE_STARTS = ("{{", "{%", "{#")
"""Beginnings of a Jinja template, which no YAML value of a configuration has."""


def load_config(files: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, or several, with their parents, apply `key.path=value` overrides in order, and validate. Raises
    UserError for a missing or unreadable file, bad YAML, a cycle of parents, a malformed override, and for every
    unknown, missing or ill-typed field."""
    paths = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    merged = _Merged()
    for path in paths:
        merged.lay(path)
    for override in overrides:
        apply_override(merged.data, override, merged.places)
    if len(paths) > 1 and "name" not in merged.data:
        merged.data["name"] = "_".join(path.stem for path in paths)
        merged.places[("name",)] = "made of the files' names"
    return validated(RunConfig, with_correction(merged.data), merged.places, ", ".join(map(str, paths)))


def format_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default written out."""
    return format_yaml(config.model_dump(mode="json"))


def dump_config(config: RunConfig, path: str | Path) -> None:
    """Write the resolved configuration, whole or not at all; `load_config` of the file gives an equal RunConfig."""
    replace_text(Path(path), format_config(config))


def read_dumped_config(path: Path) -> dict[str, Any]:
    """The plain data of a file that `dump_config` wrote, possibly in another version. Raises UserError if the file is
    damaged."""
    data, _ = _read_file(path, ())
    if not data:
        raise UserError(f"{path} is empty; restore it, for example from `config` in a checkpoint's state.json")
    return data


@dataclass
class _Merged:
    """Merged files."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    """The place (`file:line`) that set each value."""
    files: set[Path] = field(default_factory=set)
    """Resolved paths of the files."""

    def lay(self, path: Path, children: tuple[Path, ...] = ()) -> None:
        """Merge a file over the earlier ones, after its parents that are not there yet."""
        resolved = path.resolve()
        if resolved in children:
            chain = " -> ".join(str(link) for link in (*children, resolved))
            raise UserError(f"{children[-1]}: `{INHERITS}` is circular: {chain}. Remove one of the links.")
        data, lines = _read_file(path, children)
        for parent in _parents(data, path):
            if parent.resolve() not in self.files:
                self.lay(parent, (*children, resolved))
        _merge(self.data, data, str(path))
        self.places |= {key_path: f"{path}:{line}" for key_path, line in lines.items()}
        self.files.add(resolved)


def _parents(data: dict[str, Any], path: Path) -> list[Path]:
    """Take the names of its parents out of a file's data."""
    if INHERITS not in data:
        return []
    given = data.pop(INHERITS)
    parents = [given] if isinstance(given, str) else given
    if not (isinstance(parents, list) and parents and all(isinstance(each, str) and each for each in parents)):
        raise UserError(f"{path}: {INHERITS}: expected the path of a YAML file or a list of them, got {given!r}")
    found = []
    for parent in map(Path, parents):  # relative to the file, or to where a link to the file leads
        here, real = (folder / parent.expanduser() for folder in (path.parent, path.resolve().parent))
        found.append(real if real.exists() and not here.exists() else here)
    return found


def _read_file(path: Path, children: tuple[Path, ...]) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    wanted_by = f" (named by `{INHERITS}` in {children[-1]})" if children else ""
    if not path.exists():
        raise UserError(f"{path}: no such configuration file{wanted_by}")
    try:
        text = read_text(path)
    except ValueError as error:
        raise UserError(f"{path}: cannot read this configuration file{wanted_by}: {error}") from error
    data, lines = parse_yaml(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected `key: value` lines at the top level, found a {type(data).__name__}")
    return data, lines


def _merge(base: dict[str, Any] | list[Any], over: dict[Any, Any], source: str) -> None:
    """Merge `over` into `base` in place: sections key by key, list items by position, everything else replaced."""
    for key, value in over.items():
        if isinstance(base, list) and not (isinstance(key, int) and 0 <= key < len(base)):
            raise UserError(
                f"{source}: index {key!r} is out of range for the inherited list of {len(base)} items "
                f"(0 to {len(base) - 1}); or give a whole list"
            )
        inherited = base[key] if isinstance(base, list) else base.get(key)
        if isinstance(base, dict) and _is_another_choice(value, inherited):
            base[key] = value
        elif isinstance(value, dict) and (isinstance(inherited, dict) or (isinstance(inherited, list) and value)):
            _merge(inherited, value, source)
        else:
            base[key] = value


def _is_another_choice(value: Any, inherited: Any) -> bool:
    """Whether two sections choose different things by `name` (see registry.py). The `name` of a list item is only a
    label."""
    named = isinstance(value, dict) and isinstance(inherited, dict) and "name" in value and "name" in inherited
    return named and value["name"] != inherited["name"]


def apply_override(data: dict[str, Any], override: str, places: dict[KeyPath, str]) -> None:
    """Set one `key.path=value` in place; sections that no file mentions are created on the way."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"override `{override}`: expected key.path=value, such as rollout.temperature=0.7")
    value = _override_value(text, override)
    here: Any = data
    path: KeyPath = ()
    for name in names[:-1]:
        place = _position(here, name, override, path)
        if isinstance(here, dict) and here.get(place) is None:
            here[place] = {}
        here = here[place]
        path = (*path, place)
    last = _position(here, names[-1], override, path)
    here[last] = value
    for stale in [known for known in places if known[: len(path) + 1] == (*path, last)]:
        del places[stale]
    places[(*path, last)] = f"override `{override}`"


def _override_value(text: str, override: str) -> Any:
    if text.lstrip().startswith(TEMPLATE_STARTS):
        return text.strip()
    key = override.partition("=")[0]
    quoted = f"put a text with such characters in quotes: {key}='...'"
    try:
        value, _ = parse_yaml(text, f"override `{override}`")
    except UserError as error:
        raise UserError(f"{error}; {quoted}") from error
    if "#" in text and json.dumps(value, default=str).count("#") < text.count("#"):
        raise UserError(f"override `{override}`: `#` begins a comment in YAML; {quoted}")
    return value


def _position(container: Any, name: str, override: str, path: KeyPath) -> str | int:
    """`name` as a key of a section, or as a position in a list."""
    if isinstance(container, dict):
        return name
    where = ".".join(map(str, path))
    if not isinstance(container, list):
        raise UserError(f"override `{override}`: {where} is the single value {container!r}, it has no `{name}`")
    if not name.isdecimal() or int(name) >= len(container):
        raise UserError(
            f"override `{override}`: {where} is a list of {len(container)}, so `{name}` must be a position from 0 to "
            f"{len(container) - 1}"
        )
    return int(name)
