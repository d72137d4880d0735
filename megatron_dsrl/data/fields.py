"""Reading values from the rows of a prompt set: a field, a path of fields, or a template."""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import ChoicesConfig

Row = Mapping[str, Any]
FieldReader = Callable[[Row], Any]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROLES = ("system", "user", "assistant", "tool")


class BadRowError(ValueError):
    """A row that cannot be used; the message says why and names the setting."""


def field_reader(field: str, setting: str) -> FieldReader:
    """A function that reads a row's field, or a path such as `reward_model.ground_truth` or `prompt.0.content`. Strings
    along the path are parsed as JSON. `setting` names the configuration field for messages; the reader raises
    BadRowError if the row has no such field.
    """

    def read(row: Row) -> Any:
        if field in row:
            return row[field]
        value: Any = row
        for part in field.split("."):
            value = _step(value, part)
            if value is _MISSING:
                fields = ", ".join(f"`{name}`" for name in row) or "none"
                raise BadRowError(f"{setting}: the row has no field `{field}`; the fields are {fields}")
        return value

    return read


def template_reader(template: str, setting: str) -> FieldReader:
    """A function that renders a Jinja template with the row's fields. The filter `lettered` writes a list as lines `A.
    ...`, `B. ...`.

    Raises UserError if it is not a template; the reader raises BadRowError if it cannot be rendered with the row.
    """
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    environment.filters["lettered"] = lambda options: "\n".join(map("{}. {}".format, LETTERS, options))
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "ensure_ascii": False}
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise UserError(f"{setting}: not a Jinja template: {error}") from error

    def read(row: Row) -> str:
        try:
            return compiled.render(row)
        except Exception as error:  # its expressions may do anything with the row's values
            raise BadRowError(f"{setting} cannot be rendered: {error}") from error

    return read


def with_choices(row: Row, choices: ChoicesConfig, section: str = "data") -> Row:
    """The row with `options`, shuffled with their content as the seed, and `answer`, the letter of the right one.
    Raises BadRowError if a field is missing or two choices are the same."""
    setting = f"{section}.choices"
    fields = [choices.correct_field, *choices.incorrect_fields]
    options = [str(field_reader(field, setting)(row)).strip() for field in fields]
    if len(set(options)) < len(options):
        raise BadRowError(f"{setting}: the same choice occurs twice: {options!r}")
    right = options[0]
    options.sort()
    random.Random(json.dumps(options)).shuffle(options)
    return {**row, "options": options, "answer": LETTERS[options.index(right)]}


def chat_messages(value: Any, setting: str, last_role: str = "user") -> list[dict[str, str]]:
    """A chat in the form that the chat template takes. Raises BadRowError if it is not a list of turns with role and
    content, or the last one has another role."""
    value = parsed(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRowError(f"{setting}: expected a non-empty list of chat turns, got {value!r:.80}")
    turns = []
    for number, turn in enumerate(value):
        content = _text_of(turn.get("content")) if isinstance(turn, Mapping) else None
        if content is None or turn.get("role") not in ROLES:
            raise BadRowError(
                f"{setting}: turn {number} needs a role ({', '.join(ROLES)}) and a string as content, got {turn!r:.80}"
            )
        turns.append({"role": turn["role"], "content": content})
    if turns[-1]["role"] != last_role:
        raise BadRowError(f"{setting}: the last turn must be the {last_role}'s, not the {turns[-1]['role']}'s")
    return turns


def _text_of(content: Any) -> str | None:
    """The text of a turn, which OpenAI's format may split into parts; None if it is something else."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        return None
    texts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else None


def clean_answer(value: Any) -> str | None:
    """A gold answer as a stripped string; None if it is empty.

    Numbers lose a zero fraction (27.0 -> "27"). The elements of a list are joined with commas: together they are the
    answer. Raises ValueError for anything that is neither a string nor a number.
    """
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        parts = [clean_answer(part) for part in value]
        return ", ".join(part for part in parts if part is not None) or None
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ValueError(f"is a {type(value).__name__}, expected a string or a number")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"is {value}, expected a string or a finite number")
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value).strip() or None if value is not None else None


_MISSING = object()


def _step(value: Any, part: str) -> Any:
    """The value at one part of a dotted path."""
    value = parsed(value)
    if isinstance(value, Mapping):
        return value.get(part, _MISSING)
    if isinstance(value, Sequence) and not isinstance(value, str) and part.lstrip("-").isdecimal():
        return value[int(part)] if -len(value) <= int(part) < len(value) else _MISSING
    return _MISSING


def parsed(value: Any) -> Any:
    """Parse objects and lists that a data set stores as JSON strings; anything else is returned as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
