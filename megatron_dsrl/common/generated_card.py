"""Tell a model card that the program has written from one that its author wrote or changed."""

from pathlib import Path

CARD_FILE = "README.md"
GENERATED = "<!-- Written by megatron-dsrl. Remove this line to keep your own text. -->"
"""A card without this line is its author's, and never replaced."""


def has_mark(card: Path) -> bool:
    """Whether a card has that line."""
    return GENERATED in card.read_text(encoding="utf-8", errors="replace")
