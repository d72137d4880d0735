"""Reduce the finished runs of a sweep to one small line each: `results/<sweep>.jsonl`, from which `page` draws.

    python -m examples.laboratory.collect examples/laboratory/comparison.yaml

Run it again when more runs have finished; several machines can collect into one checkout, run by run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.laboratory.behaviours import shares
from megatron_dsrl.analysis.problems import by_step, visits
from megatron_dsrl.analysis.responses import RecordedResponse, read_steps, responses_of_step
from megatron_dsrl.analysis.thoughts import thoughts_of_step
from megatron_dsrl.observability.records import Record, read_records, replace_records
from megatron_dsrl.observability.run_records import RunRecords, read_run
from megatron_dsrl.provenance.differences import starts_that_count
from megatron_dsrl.provenance.words import commit_words
from megatron_dsrl.run.sweep import SweepRun, load_sweep, runs_of

RESULTS = Path(__file__).parent / "results"
DECIMALS = 4
OF_A_STEP = ("seconds/step", "pre_train/mean_log_prob_gap", "response/mean_tokens", "response/truncated_fraction")
"""Step metrics that are kept."""


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="sweep file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: this one's)")
    options = parser.parse_args()
    known = collect(options.sweep, options.results)
    print(f"{len(known)} runs in {options.results / options.sweep.stem}.jsonl")
    return 0


def collect(sweep_file: Path, results: Path) -> list[Record]:
    """Write the records of all finished runs, including those of earlier calls, and return them.

    Raises:
        UserError: the sweep file or a run folder is damaged.
    """
    runs = runs_of(load_sweep(sweep_file), sweep_file.parent)
    file = results / f"{sweep_file.stem}.jsonl"
    known = {(record["method"], record["seed"]): record for record in read_records(file)}
    for run in runs:
        if (run.folder / "metrics.jsonl").exists() and (record := record_of(run)) is not None:
            known[run.method, run.seed] = record
    order = [(run.method, run.seed) for run in runs]
    records = sorted(known.values(), key=lambda record: order.index((record["method"], record["seed"])))
    results.mkdir(parents=True, exist_ok=True)
    replace_records(file, records)
    return records


def record_of(sweep_run: SweepRun) -> Record | None:
    """Method, seed, commit, evaluations and step records of a run; None until it has been evaluated after its last
    step."""
    run = read_run(sweep_run.folder)
    evaluations = [record for records in run.evaluations.values() for record in records]
    if not run.steps or run.steps[-1]["step"] != run.total_steps:
        return None
    if max((record["step"] for record in evaluations), default=0) != run.total_steps:
        return None
    return {
        "method": sweep_run.method,
        "seed": sweep_run.seed,
        "commit": "; ".join({commit_words(start): None for start in starts_that_count(run.folder, run.total_steps)}),
        "phases": [[phase.name, phase.first_step, phase.last_step] for phase in run.phases],
        "evaluations": [_rounded(record) for record in evaluations],
        "steps": as_columns(_step_records(run)),
    }


def as_columns(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Values by key, in the order of the records, None where one lacks the key: a third of the size as text."""
    keys = dict.fromkeys(key for record in records for key in record)
    return {key: [record.get(key) for record in records] for key in keys}


def _step_records(run: RunRecords) -> list[Record]:
    metrics = {record["step"]: record for record in run.steps}
    steps = list(read_steps(run.folder))
    problems = {record["step"]: record for record in by_step(visits(steps))}
    return [
        _rounded(
            {key: metrics[step][key] for key in OF_A_STEP if key in metrics[step]}
            | of_responses(step, responses_of_step(step, groups))
            | {key: problems[step][key] for key in ("solved", "unsolved", "solved_at_least_once")}
        )
        for step, groups in steps
    ]


def of_responses(step: int, responses: Sequence[RecordedResponse]) -> Record:
    """Accuracy, thoughts and behaviours of one step's responses; accuracy is on problems that training has not seen, as
    long as no problem occurs twice."""
    thoughts = thoughts_of_step(step, responses)
    return {
        "step": step,
        "accuracy": sum(response.right for response in responses) / len(responses),
        "reflections": thoughts["reflections"],
        "transitions": thoughts["transitions"],
        **shares([response.text for response in responses]),
    }


def _rounded(record: Record) -> Record:
    return {key: round(value, DECIMALS) if isinstance(value, float) else value for key, value in record.items()}


if __name__ == "__main__":
    sys.exit(main())
