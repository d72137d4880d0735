"""What a run shows and records of its steps: timeline and terminal on every rank, records on rank 0.

The figures of a step's rollout are in `rollout_metrics.py`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.algorithms.importance import MISMATCH_MAXIMA, MISMATCH_MEANS
from megatron_dsrl.algorithms.reward_shaping import shaping_metrics
from megatron_dsrl.algorithms.spaces import Space
from megatron_dsrl.common.collective import on_first, rank
from megatron_dsrl.config.phase import MAIN_OBJECTIVE, PhaseConfig
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.timeline import SecondsPerPart
from megatron_dsrl.platform import current_platform
from megatron_dsrl.rollout.rollout import StepSamples, responses_of
from megatron_dsrl.rollout.sample import SampleGroup
from megatron_dsrl.run.rollout_metrics import response_metrics, rollout_metrics
from megatron_dsrl.run.start import TrainingRun


def start_step(run: TrainingRun, step: int) -> SecondsPerPart:
    """The timer of a step that starts now; its parts are in the timeline and, on rank 0, on the terminal."""

    @contextmanager
    def doing(part: str) -> Iterator[None]:
        shown = rank() == 0 and part != "generate"  # sampling has its own bar
        with run.timeline.span(part), run.console.doing(step, part.replace("_", " ")) if shown else nullcontext():
            yield

    run.timeline.start_step(step)
    return SecondsPerPart(span=doing)


def record_step(
    run: TrainingRun,
    step: int,
    samples: StepSamples | None,
    update: UpdateMetrics | None,
    critic_metrics: Mapping[str, float],
    timer: SecondsPerPart,
) -> None:
    """Record and print a finished step on rank 0. Collective. Raises UserError, on all ranks, if rank 0 cannot write,
    because the disk is full for instance.

    Args:
        samples: rank 0's.
        update: None if the policy was not updated.
    """
    device_metrics = run.device.metrics()

    def record() -> None:
        assert run.tracker is not None and samples is not None
        further = {**critic_metrics, **device_metrics, **run.rollout.engine_metrics(), **timer.metrics()}
        record = step_record(run, step, samples, update, further)
        run.tracker.log_step(record)
        run.console.step(record)
        if warning := log_prob_gap_warning(record, run.config.observability.max_log_prob_gap):
            run.console.message(warning)

    on_first(record)


def record_evaluation(run: TrainingRun, record: Record, started: float, responses: Sequence[Record] = ()) -> None:
    """Record and print an evaluation of one set, started at this `perf_counter`, with some of its responses. Rank 0
    only."""
    assert run.tracker is not None
    record = {**record, "seconds": time.perf_counter() - started, "time": time.time()}
    run.tracker.log_evaluation(record, responses)
    run.console.evaluation(record)


def step_record(
    run: TrainingRun, step: int, samples: StepSamples, update: UpdateMetrics | None, further: Mapping[str, float]
) -> Record:
    """The `metrics.jsonl` record of a finished step; `further` are its last metrics, by full name."""
    phase, config = run.schedule.at(step), run.config
    if samples.judged:
        rollout = rollout_metrics(samples.sampled, samples.generated_tokens, samples.seconds)
    else:
        rollout = response_metrics([sample for group in samples.groups for sample in group.samples])
    responses = responses_of(samples.groups, step)
    memory = current_platform().memory_statistics()
    return {
        "step": step,
        "phase": phase.name,
        "space": scored_spaces(phase),
        "weight_version": step,
        "time": time.time(),
        **samples.metrics,
        **rollout,
        **older_token_metrics(samples.groups, step),
        **shaping_metrics(responses, config.reward.overlong, config.rollout.max_response_tokens),
        **update_metrics(update, phase),
        "memory/trainer_gib": memory.allocated_bytes / 2**30,  # of rank 0's process
        "memory/trainer_peak_gib": memory.peak_bytes / 2**30,
        **further,
    }


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
    to the step's update and keep their names; `scored_spaces` says where their meaning changes.
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
    """An objective's metrics of scored tokens, under names that say which distribution they describe."""
    mismatch, prefix = (*MISMATCH_MEANS, *MISMATCH_MAXIMA), "" if name == MAIN_OBJECTIVE else f"{name}/"
    if space.prompt_in_context:
        return {f"{prefix}mismatch/{key}" if key in mismatch else f"{name}/{key}": figures[key] for key in figures}
    meaningful = [key for key in figures if key not in mismatch or key == "mean_log_prob_gap"]
    return {f"{prefix}{space.metrics_prefix}/{key}": figures[key] for key in meaningful}


def log_prob_gap_warning(record: Mapping[str, Any], limit: float) -> str | None:
    """A warning if trainer and engine log-probs differ by more than `limit` nats, else None.

    Only if both had the same weights and the prompt in context: not with tokens of older weights.
    """
    gap = record.get("mismatch/mean_log_prob_gap")
    if gap is None or gap <= limit or "response/older_token_fraction" in record:
        return None
    return (
        f"warning: trainer and engine log-probs differ by {gap:.3g} nats on average, above "
        f"observability.max_log_prob_gap={limit:g}; see examples/troubleshooting: the log-prob gap is large"
    )
