"""The four reasoning behaviours of arXiv 2503.18892, found by rule: this family writes each in fixed words."""

import re
from collections.abc import Sequence
from statistics import fmean

from examples.laboratory.task import CHECK, NEED, WAIT
from megatron_dsrl.analysis.behaviours import BEHAVIOURS

_WORKING = re.compile(r"\d+[+-]\d+=-?\d+(?:\n\d+[+-]\d+=-?\d+)*")


def behaviours_of(text: str) -> dict[str, bool]:
    """Which behaviours a response shows.

    `enumeration` is two or more different attempts, `backtracking` an attempt after "Wait, go back.", `verification`
    the line "Let me check:", `subgoal_setting` "I need ... before ...".
    """
    after_going_back = text.partition(WAIT)[2]
    found = {
        "subgoal_setting": NEED in text,
        "enumeration": len(set(_WORKING.findall(text))) >= 2,
        "verification": CHECK in text,
        "backtracking": _WORKING.search(after_going_back) is not None,
    }
    assert tuple(found) == BEHAVIOURS
    return found


def shares(texts: Sequence[str]) -> dict[str, float]:
    """Share of responses with each behaviour; there must be at least one response."""
    found = [behaviours_of(text) for text in texts]
    return {name: fmean(one[name] for one in found) for name in BEHAVIOURS}
