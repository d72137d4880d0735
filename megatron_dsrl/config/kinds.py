"""The kinds of configuration, a run's and the smaller ones, and the JSON schemas for editors.

`pydantic` describes a section as it is once a file and its parents are merged. A file itself may leave out what it
inherits, and may change items of an inherited list by their positions: `inheriting_schema` allows both.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, NoDefault
from pydantic_core import core_schema

from megatron_dsrl.config.benchmark import BenchmarkConfig, BenchmarkRunConfig
from megatron_dsrl.config.load import INHERITS
from megatron_dsrl.config.model import GradientAnalysisConfig
from megatron_dsrl.config.registry import Options
from megatron_dsrl.config.run import RunConfig, SweepConfig
from megatron_dsrl.config.section import Section

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PARTIAL = "Partial"
"""First part of the name of a section's schema in which nothing is required."""


class _ConfigJsonSchema(GenerateJsonSchema):
    """The schema with defaults from factories and without field titles."""

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        """The default in JSON; defaults from factories included, sections excluded."""
        factory = schema.get("default_factory")
        default = super().get_default_value(schema) if factory is None else factory()  # type: ignore[call-arg]
        if isinstance(default, Options):
            return default.model_dump(mode="json")
        return NoDefault if isinstance(default, Section) else default  # a section's fields have their own

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # `Clip Low` says no more than `clip_low`


def section_schema(section: type[Section]) -> dict[str, Any]:
    """The schema of a whole section, as it is after parents and overrides."""
    return {"$schema": DIALECT, **section.model_json_schema(schema_generator=_ConfigJsonSchema)}


def inheriting_schema(section: type[Section]) -> dict[str, Any]:
    """The schema of a file with that section at its top level, which may leave out what it inherits from others."""
    schema = partial_schema(section)
    files = {"type": "string", "pattern": r"\.ya?ml$"}
    parents = {
        "description": "A file, or a list of files, that this one builds on; relative to this file. Later ones win.",
        "anyOf": [files, {"type": "array", "items": files, "minItems": 1}],
    }
    return schema | {"properties": {INHERITS: parents, **schema["properties"]}}


def partial_schema(section: type[Section]) -> dict[str, Any]:
    """A section's schema in which any part may be missing, except within list items."""
    whole = section_schema(section)
    definitions = whole.pop("$defs", {})
    partial = {PARTIAL + name: _partial(schema) for name, schema in definitions.items()}
    return _partial(whole) | {"$defs": definitions | partial}


def as_text(schema: dict[str, Any]) -> str:
    """A schema as the text of its file."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _partial(schema: dict[str, Any]) -> dict[str, Any]:
    partial = copy.deepcopy(schema)
    # A custom class is recognised by its dotted path; otherwise any key would be valid.
    if required := [name for name in partial.pop("required", []) if "pattern" in partial["properties"].get(name, {})]:
        partial["required"] = required
    partial["properties"] = {name: _partial_value(value) for name, value in partial["properties"].items()}
    return partial


def _partial_value(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return schema | {"$ref": schema["$ref"].replace("#/$defs/", f"#/$defs/{PARTIAL}")}
    if "items" in schema and _holds_sections(schema["items"]):
        described = {key: schema.pop(key) for key in ("description", "default", "title") if key in schema}
        return described | {"anyOf": [schema, _changed_items(schema["items"])]}
    members = schema.pop("oneOf", None) or schema.get("anyOf")
    if members is not None:
        # Without a `name`, options can belong to more than one choice.
        schema["anyOf"] = [_partial_value(member) for member in members]
    return _partial(schema) if "properties" in schema else schema


def _holds_sections(items: dict[str, Any]) -> bool:
    return "$ref" in items or any("$ref" in member for member in [*items.get("anyOf", []), *items.get("oneOf", [])])


def _changed_items(items: dict[str, Any]) -> dict[str, Any]:
    """`{0: {until_step: 5}}` changes the first item of an inherited list."""
    return {
        "description": "Changes to items of the inherited list, by their positions from 0.",
        "type": "object",
        "patternProperties": {r"^\d+$": _partial_value(copy.deepcopy(items))},
        "additionalProperties": False,
    }


@dataclass(frozen=True)
class Kind:
    """One kind of configuration."""

    section: type[Section]
    where: str
    """Where it is written."""
    schema: Callable[[], dict[str, Any]]
    """Returns the JSON schema of its files, or of all its overrides."""


def _benchmark_file() -> dict[str, Any]:
    """`file` and `hub` hold the fields that depend on where the problems come from."""
    schema = partial_schema(BenchmarkConfig)
    place = {"type": "object", "properties": schema["properties"], "additionalProperties": False}
    places = {
        "file": {"description": "Settings for problems from a file in the data folder.", **place},
        "hub": {"description": "Settings for problems from the hub.", **place},
    }
    return schema | {"properties": schema["properties"] | places, "anyOf": [{"required": [each]} for each in places]}


KINDS = {
    "run": Kind(RunConfig, "a file for `dsrl train`", lambda: inheriting_schema(RunConfig)),
    "sweep": Kind(SweepConfig, "a file for `dsrl sweep`", lambda: section_schema(SweepConfig)),
    "benchmark": Kind(BenchmarkConfig, "a file for `dsrl eval --benchmarks`", _benchmark_file),
    "eval": Kind(BenchmarkRunConfig, "overrides of `dsrl eval`", lambda: partial_schema(BenchmarkRunConfig)),
    "gradients": Kind(
        GradientAnalysisConfig,
        "overrides of `dsrl analyse gradients` and `dsrl samples --log-probs`",
        lambda: partial_schema(GradientAnalysisConfig),
    ),
}
"""By name, as in `dsrl config --kind`."""

FILES = ("run", "sweep", "benchmark")
"""The kinds that are files."""
