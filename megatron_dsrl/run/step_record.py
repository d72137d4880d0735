"""The record of a step. Metrics of its rollout are in `rollout_metrics.py`."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.algorithms.importance import MISMATCH_MAXIMA, MISMATCH_MEANS
from megatron_dsrl.algorithms.reward_shaping import shaping_metrics
from megatron_dsrl.algorithms.spaces import Space
from megatron_dsrl.config.phase import MAIN_OBJECTIVE, PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.observability.records import Record
from megatron_dsrl.platform import current_platform
from megatron_dsrl.rollout.rollout import StepSamples, responses_of
from megatron_dsrl.rollout.sample import SampleGroup
from megatron_dsrl.run.rollout_metrics import response_metrics, rollout_metrics


def step_record(
    config: RunConfig,
    step: int,
    phase: PhaseConfig,
    samples: StepSamples,
    update: UpdateMetrics | None,
    further: Mapping[str, int | float],
) -> Record:
    """What `metrics.jsonl` says of a finished step.

    Args:
        update: None if the policy was not updated.
        further: metrics by full name, the last of the record.
    """
    responses, limit = responses_of(samples.groups, step), config.rollout.max_response_tokens
    return {
        "step": step,
        "phase": phase.name,
        "space": scored_spaces(phase),
        "weight_version": step,
        "time": time.time(),
        **samples.metrics,
        **_metrics_of_samples(samples),
        **older_token_metrics(samples.groups, step),
        **shaping_metrics(responses, config.reward.overlong, limit),
        **update_metrics(update, phase),
        **memory_metrics(),
        **further,
    }


def _metrics_of_samples(samples: StepSamples) -> dict[str, int | float]:
    if not samples.judged:
        return response_metrics([sample for group in samples.groups for sample in group.samples])
    return rollout_metrics(samples.sampled, samples.generated_tokens, samples.seconds)


def older_token_metrics(groups: Sequence[SampleGroup], weight_version: int) -> dict[str, float]:
    """Fraction of response tokens sampled by weights older than those being updated; empty without response tokens."""
    samples = [sample for group in groups for sample in group.samples]
    older = sum(sample.tokens_before(weight_version) for sample in samples)
    return {"response/older_token_fraction": older / sum(len(s.response_ids) for s in samples)} if older else {}


def update_metrics(update: UpdateMetrics | None, phase: PhaseConfig) -> dict[str, float]:
    """The `policy/*`, `mismatch/*`, `pre_train/*` and `router/*` metrics of a step record, and `<name>/*` of additional
    objectives.

    Metrics of the scored tokens (entropy, clipping, KL, the loss's own) describe a different distribution in each
    space, so they have different names: `policy/entropy` is that of P(y|x), `pre_train/entropy` that of P(y). Mismatch
    metrics compare trainer and engine, which makes sense only if both condition on the prompt; in the pre-train space
    only the gap is kept, which is the one between log P(y) and log P(y|x). Loss, gradient norm and learning rate belong
    to the step's update and keep their names; `scored_spaces` tells where their meaning changes.
    """
    names = [f"{name}/{count}" for name in phase.objectives for count in ("kept_samples", "kept_tokens")]
    counts: dict[str, float] = dict.fromkeys(names, 0)
    if update is None:  # no step was taken: the filters dropped every sample, or only the critic was trained
        return counts
    metrics = counts | {"policy/grad_norm": update.grad_norm, "policy/learning_rate": update.learning_rate}
    if len(phase.objectives) > 1:
        metrics["policy/total_loss"] = update.loss
    for name, objective in update.objectives.items():
        metrics |= {f"{name}/{key}": value for key, value in objective.totals().items()}
        metrics |= _token_metrics(name, objective.token_metrics(), phase.objectives[name].space)
    return metrics | {f"router/{name}": value for name, value in update.router.items()}


def scored_spaces(phase: PhaseConfig) -> str:
    """The `space` of a step record: the spaces of all objectives, joined by `+`, such as `post_train+pre_train`."""
    return "+".join(dict.fromkeys(objective.space.name for objective in phase.objectives.values()))


def _token_metrics(name: str, figures: dict[str, float], space: Space) -> dict[str, float]:
    """An objective's metrics of scored tokens, under names that tell the distribution that they describe."""
    mismatch, prefix = (*MISMATCH_MEANS, *MISMATCH_MAXIMA), "" if name == MAIN_OBJECTIVE else f"{name}/"
    if space.prompt_in_context:
        return {f"{prefix}mismatch/{key}" if key in mismatch else f"{name}/{key}": figures[key] for key in figures}
    meaningful = [key for key in figures if key not in mismatch or key == "mean_log_prob_gap"]
    return {f"{prefix}{space.metrics_prefix}/{key}": figures[key] for key in meaningful}


def log_prob_gap_warning(record: Mapping[str, Any], limit: float) -> str | None:
    """A warning if trainer and engine log-probs differ by more than `limit` nat, else None.

    Only if both had the same weights and the prompt in context: not with tokens of older weights.
    """
    gap = record.get("mismatch/mean_log_prob_gap")
    if gap is None or gap <= limit or "response/older_token_fraction" in record:
        return None
    return (
        f"warning: trainer and engine log-probs differ by {gap:.3g} nat on average, above "
        f"observability.max_log_prob_gap={limit:g}; see examples/troubleshooting: the log-prob gap is large"
    )


def memory_metrics() -> dict[str, float]:
    """The `memory/*` metrics of a step record: device memory of rank 0's trainer process, in GiB."""
    statistics = current_platform().memory_statistics()
    return {
        "memory/trainer_gib": statistics.allocated_bytes / 2**30,
        "memory/trainer_peak_gib": statistics.peak_bytes / 2**30,
    }
