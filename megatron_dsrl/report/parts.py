"""What pages are made of, beside charts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One figure with its name."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells in words; the first cell of a row is its name."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
