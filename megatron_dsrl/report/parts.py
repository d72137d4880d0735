"""Building blocks of pages other than charts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One figure with its name."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text cells; the first cell of a row is its name."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
