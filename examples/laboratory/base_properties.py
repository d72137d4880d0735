"""What a base model does before any RL, and whether the laboratory may use it: protocol.md has the conditions.

    python -m examples.laboratory.base_properties paper_like

reads the samples that `dsrl eval` drew from the base, and the gradients of `dsrl analyse gradients` if they are there,
and writes `results/base_paper_like.json`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from examples.laboratory.collect import RESULTS, of_responses
from examples.laboratory.settings import BASES, CACHE
from megatron_dsrl.analysis.alignment import summary
from megatron_dsrl.analysis.responses import RecordedResponse, read_responses
from megatron_dsrl.analysis.thoughts import count_thoughts
from megatron_dsrl.evaluation.metrics import bootstrap_interval, mean_pass_at_k
from megatron_dsrl.observability.records import Record, read_records

LIMIT_TOKENS = 128
"""Length limit of the runs: `rollout.max_response_tokens` of size.yaml."""
PASS_AT = 32
ONLY_THE_PROMPT = 1.0
"""A token counts as explained by the prompt alone if its log-prob gap is larger than this. Unit: nats."""


def main() -> int:
    """Command line; returns the exit status: 1 if a condition is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=BASES, help="which base")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: this one's)")
    options = parser.parse_args()
    folder = Path(CACHE) / options.base / "evaluation"
    ((_, responses),) = read_responses(folder / "samples" / "held_out.jsonl")
    properties = properties_of(responses)
    if gradients := read_records(folder / "gradients.jsonl"):
        properties["gradients"] = gradient_figures(gradients)
    options.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"base": options.base, "settings": BASES[options.base].model_dump(), **properties}, indent=1)
    (options.results / f"base_{options.base}.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in properties.items() if key != "gradients"}, indent=1))
    return 0 if all(properties["conditions"].values()) else 1


def properties_of(responses: Sequence[RecordedResponse]) -> Record:
    """Figures of a base's responses to held-out problems, and which of the conditions they meet.

    Args:
        responses: the same number, at least `PASS_AT`, for every problem.
    """
    by_problem: dict[int, list[bool]] = {}
    for response in responses:
        by_problem.setdefault(response.problem, []).append(response.right)
    figures = of_responses(0, responses)
    thoughts = figures["reflections"] + figures["transitions"]
    mean_tokens = sum(response.tokens for response in responses) / len(responses)
    pass_at = mean_pass_at_k(list(by_problem.values()), PASS_AT)
    searching = [response.right for response in responses if _searches(response)]
    others = [response.right for response in responses if not _searches(response)]
    return {
        **figures,
        "thoughts": thoughts,
        f"pass@{PASS_AT}": pass_at,
        "mean_tokens": mean_tokens,
        "searching_responses": len(searching) / len(responses),
        "accuracy_of_searching": sum(searching) / max(1, len(searching)),
        "accuracy_of_others": sum(others) / max(1, len(others)),
        "conditions": {
            "Avg@1 between 15 and 40 %": 0.15 <= figures["accuracy"] <= 0.40,
            "Pass@32 above 80 %": pass_at > 0.80,
            "less than 0.3 thoughts per response": thoughts < 0.3,
            "mean length below half of the limit": mean_tokens < LIMIT_TOKENS / 2,
        },
    }


def gradient_figures(records: Sequence[Record]) -> Record:
    """Figures from `dsrl analyse gradients` for the page, with bootstrap intervals over responses.

    Args:
        records: of at least two responses.
    """
    found = summary(records)
    gaps = [gap for record in records for gap in record["gaps"]]
    return {
        "responses": len(records),
        "cosine": _with_interval([record["cosine"] for record in records if record["cosine"] is not None]),
        "negative": _with_interval([float(record["inner_product"] < 0) for record in records]),
        "mean_gap": found["mean_gap"],
        "only_the_prompt": sum(gap > ONLY_THE_PROMPT for gap in gaps) / len(gaps),
        "gap_by_position": found["gap_by_position"],
        "gap_by_entropy": found["gap_by_entropy"],
    }


def _with_interval(values: Sequence[float]) -> Record:
    low, high = bootstrap_interval(values) or (None, None)
    return {"mean": fmean(values), "low": low, "high": high}


def _searches(response: RecordedResponse) -> bool:
    counts = count_thoughts(response.text)
    return counts.reflections + counts.transitions > 0


if __name__ == "__main__":
    sys.exit(main())
