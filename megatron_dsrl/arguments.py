"""Values on the command line that several commands take."""

import argparse
import math
from pathlib import Path


def positive(text: str) -> int:
    """
    Raises:
        ArgumentTypeError: it is not a positive integer.
    """
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def positive_number(text: str) -> float:
    """
    Raises:
        ArgumentTypeError: it is not a finite number above 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def labelled_folders(text: str) -> tuple[str, list[Path]]:
    """`LABEL=FOLDER,FOLDER`, or `FOLDER`, whose name is its label."""
    label, equals, folders = text.partition("=")
    return (label, [Path(folder) for folder in folders.split(",")]) if equals else (Path(text).name, [Path(text)])
