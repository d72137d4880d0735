"""Response length and entropy over training.

Two estimates of the policy's entropy per token given the prompt: the trainer's, exact for every trained token, in steps
of the post-train space (`policy/entropy`; with a sample filter, only some samples are trained on); and the mean of
-log P over all sampled tokens, from the engine's log-probs (see `run.rollout_metrics.entropy_metrics`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean

from megatron_dsrl.charts.chart_source import Series, ValueAxis
from megatron_dsrl.charts.charts import Chart, line_chart
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import PhaseSpan
from megatron_dsrl.rollout.sample import Sample, SampleGroup


def lengths_of_step(step: int, groups: Sequence[SampleGroup], metrics: Mapping[int, Record]) -> Record:
    """Lengths in tokens and entropies in nats; None for means over nothing. `metrics` has the run's step records by
    step; this step's may be missing."""
    samples = [sample for group in groups for sample in group.samples]
    log_probs = [log_prob for sample in samples for log_prob in sample.policy_log_probs]
    return {
        "step": step,
        "responses": len(samples),
        "mean_tokens": _mean_tokens(samples),
        "mean_tokens_of_right": _mean_tokens([sample for sample in samples if sample.reward >= 1]),
        "mean_tokens_of_others": _mean_tokens([sample for sample in samples if sample.reward < 1]),
        "truncated_fraction": fmean(sample.finish_reason == "length" for sample in samples) if samples else None,
        "sampled_entropy": -fmean(log_probs) if log_probs else None,
        "trained_entropy": metrics.get(step, {}).get("policy/entropy"),
    }


def summary(records: Sequence[Record]) -> Record:
    """The values of the first and last step."""
    names = ("mean_tokens", "truncated_fraction", "sampled_entropy", "trained_entropy")
    first, last = records[0], records[-1]
    figures: Record = {"first_step": first["step"], "last_step": last["step"]}
    for name in names:
        figures |= {f"{name}_first": first[name], f"{name}_last": last[name]}
    return figures


def charts(records: Sequence[Record], phases: Sequence[PhaseSpan]) -> list[Chart]:
    """Curves over the steps; the records must be ordered by step."""
    series = partial(Series.of_records, records)
    return [
        line_chart(
            "Response length",
            "Mean tokens per response.",
            [
                series("all", "mean_tokens", 1),
                series("right", "mean_tokens_of_right", 3),
                series("others", "mean_tokens_of_others", 2),
            ],
            phases,
            ValueAxis("tokens"),
        ),
        line_chart(
            "Truncated responses",
            "Fraction of responses that were cut at the length limit.",
            [series("fraction", "truncated_fraction", 2)],
            phases,
            ValueAxis("fraction", at_least=0.0, at_most=1.0),
        ),
        line_chart(
            "Entropy",
            "Nat per token: mean of -log P over sampled tokens, and the trainer's over trained tokens.",
            [series("sampled", "sampled_entropy", 4), series("trained", "trained_entropy", 5)],
            phases,
            ValueAxis("nats per token"),
        ),
    ]


def _mean_tokens(samples: Sequence[Sample]) -> float | None:
    return fmean(len(sample.response_ids) for sample in samples) if samples else None
