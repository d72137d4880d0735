"""The kernels that Transformer Engine chooses for attention, which it only reports in its log."""

import re
from collections.abc import Sequence

LOGGING = {"NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "1"}
"""Environment variables with which it logs each choice."""
LOG_LINE = re.compile(r"^(?:\[\w+\]:)?\[(?:INFO|DEBUG) *\| \w+ *\]: ")
CHOICE = re.compile(r"\]: Running with (.+ backend.*)$")


def is_log_line(line: str) -> bool:
    """Whether Transformer Engine logged a line. It logs one for every micro-batch and layer."""
    return bool(LOG_LINE.match(line))


def attention_backends(lines: Sequence[str]) -> dict[str, str]:
    """What it chose, as a figure; empty if it logged no choice."""
    chosen = sorted({found[1] for line in lines if (found := CHOICE.search(line))})
    return {"trainer, attention of Transformer Engine": "; ".join(chosen)} if chosen else {}
