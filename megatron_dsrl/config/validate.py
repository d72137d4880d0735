"""From plain data to a section of the configuration, with one message that names every wrong field."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.explain import explain_validation_error, in_brackets
from megatron_dsrl.config.section import Section
from megatron_dsrl.config.yaml_text import KeyPath

SectionClass = TypeVar("SectionClass", bound=Section)


def validated(
    section: type[SectionClass],
    data: Any,
    places: Mapping[KeyPath, str],
    source: str,
    what: str = "configuration",
) -> SectionClass:
    """Check plain data, as read from YAML, against a section's class.

    Args:
        data: the section's keys and values.
        places: where the value of a key path was set, such as `run.yaml:3`.
        source: the file or command that the data comes from, for the message.
        what: what the data is, for the message.

    Raises:
        UserError: a field is unknown, missing, or has a wrong value; every one is named, with its place.
    """
    problems = [
        f"  {'.'.join(map(str, path))}: {problem}{in_brackets(path, places)}" for path, problem in _not_json(data, ())
    ]
    if not problems:
        try:
            # JSON mode: a YAML list may stand for a tuple there, while every type stays strict.
            return section.model_validate_json(json.dumps(data, allow_nan=False))
        except ValidationError as error:
            problems = [f"  {problem}" for problem in explain_validation_error(error, section, data, places)]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise UserError("\n".join([f"{source}: {count} in the {what}", *problems]))


def _not_json(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Values that YAML can write but a configuration cannot hold: infinities, NaN, binary, sets, non-string keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _not_json(item, (*path, key))
            else:
                yield (*path, str(key)), f'a key must be a string; write "{key}" in quotes if this one is meant'
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _not_json(item, (*path, position))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"expected a finite number, got {value}"
    elif not isinstance(value, str | int | float | None):
        yield path, f"cannot hold a {type(value).__name__}"
