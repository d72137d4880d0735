"""Text for a terminal or a page: text of unknown origin, such as a model's, made safe and short, and tables."""

import unicodedata
from collections.abc import Iterable, Sequence


def visible(text: str, keep_lines: bool = True) -> str:
    """The text with control characters escaped, except newlines and tabs if `keep_lines`.

    Characters that change the direction of text, and invisible ones, are escaped as well. Spaces of any width are kept.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if keep_lines else ""

    def shown(character: str) -> str:
        if character.isprintable() or character in kept or unicodedata.category(character) == "Zs":
            return character
        return character.encode("unicode_escape").decode()

    return "".join(map(shown, text))


def shortened(text: str, most: int) -> str:
    """The text, or about `most` characters of it: its beginning and end, with a note between."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n\n[… {len(text) - 2 * half:,} characters left out …]\n\n{text[-half:]}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The lines of a table, without a final line end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
