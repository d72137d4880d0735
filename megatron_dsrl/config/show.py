"""Output of `dsrl config`: a field or a section, for a terminal of any width."""

import inspect
import textwrap

from rich.console import Console
from rich.text import Text

from megatron_dsrl.config import describe
from megatron_dsrl.config.describe import Place
from megatron_dsrl.config.registry import options_of
from megatron_dsrl.config.section import Section


def show(place: Place, console: Console) -> None:
    """Print what a place of the configuration is, and what is below it."""
    if place.field is not None:
        console.print(place.path, style="bold")
        _indented(console, _type_and_default(place), 2)
        console.print()
        _indented(console, describe.meaning_of(place), 2)
    else:
        if place.path:
            console.print(place.path, style="bold")
        _indented(console, describe.documentation(place.section), 2 if place.path else 0)
    if len(place.sections) > 1:
        _show_choices(console, place.sections)
    elif place.sections:
        _show_fields(console, place.sections[0])
    elif place.field is not None and (function := describe.function_of(place.field)) is not None:
        console.print("\nbuilt in", style="bold")
        for name, built_in in function.functions().items():
            _entry(console, name, "", describe.documentation(built_in).partition("\n\n")[0])
            for option in options_of(built_in):
                required = option.default is inspect.Parameter.empty
                default = "required" if required else f"default {option.default}"
                _indented(console, f"{option.name}: {default}. {option.meaning}", 8)


def _show_fields(console: Console, section: type[Section]) -> None:
    console.print("\nfields", style="bold")
    for name, field in section.model_fields.items():
        if name == "name" and describe.tags(section):  # the choice itself
            continue
        place = Place(name, section, field)
        _entry(console, name, _type_and_default(place), describe.meaning_of(place).partition("\n\n")[0])


def _show_choices(console: Console, sections: list[type[Section]]) -> None:
    console.print("\nchoices", style="bold")
    for section in sections:
        name, *_ = describe.tags(section)
        _entry(console, str(name), "", describe.documentation(section))
        for option, field in section.model_fields.items():
            if option != "name":
                _indented(console, f"{option}: {_type_and_default(Place(option, section, field))}", 8)


def _type_and_default(place: Place) -> str:
    assert place.field is not None
    default, limits = describe.default_of(place.field), describe.limits_of(place.field)
    parts = [describe.type_of(place.field)]
    if default is None:
        parts.append("required")
    elif default not in ("section", "{}", "[]"):
        parts.append(f"default {default}")
    return ", ".join(parts + ([limits] if limits else []))


def _entry(console: Console, name: str, type_and_default: str, meaning: str) -> None:
    text = f"{name}: {type_and_default}" if type_and_default else name
    lines = Text(_wrapped(text, console.width, 2, further=2))
    lines.stylize("bold", 2, 2 + len(name))
    console.print(lines, soft_wrap=True)
    _indented(console, meaning, 6)


def _indented(console: Console, text: str, columns: int) -> None:
    if text:
        paragraphs = [_wrapped(paragraph, console.width, columns) for paragraph in text.split("\n\n")]
        console.print(Text("\n\n".join(paragraphs)), soft_wrap=True)


def _wrapped(text: str, width: int, columns: int, further: int = 0) -> str:
    """Lines that begin after `columns` spaces; all but the first after `further` more."""
    indent = " " * columns
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent + " " * further, break_on_hyphens=False
    )
