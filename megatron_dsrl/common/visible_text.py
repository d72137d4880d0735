"""Text of unknown origin, such as a model's, made safe to look at in a terminal or on a page."""

import unicodedata


def visible(text: str, keep_lines: bool = True) -> str:
    """The text with control characters escaped, except newlines and tabs if `keep_lines`.

    Escaped are also characters that change the direction of text, and others that show nothing. Spaces of any width are
    kept.
    """
    if text.isprintable():
        return text
    kept = "\n\t" if keep_lines else ""
    return "".join(c if c.isprintable() or c in kept or _is_space(c) else _escaped(c) for c in text)


def _is_space(character: str) -> bool:
    return unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
