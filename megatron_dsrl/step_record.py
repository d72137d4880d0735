"""What a step record says of the update, and of how old the sampled tokens were.

Of the rollout, see `observability/step_metrics.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.algorithms.mismatch import MISMATCH_MAXIMA, MISMATCH_MEANS
from megatron_dsrl.config.phase import MAIN_OBJECTIVE, PhaseConfig, PreTrainSpaceConfig
from megatron_dsrl.platform import current_platform
from megatron_dsrl.rollout.sample import Group


def older_token_metrics(groups: Sequence[Group], weight_version: int) -> dict[str, float]:
    """The share of tokens that older weights produced than those that are updated; empty where there are none."""
    samples = [sample for group in groups for sample in group.samples]
    older = sum(sample.tokens_before(weight_version) for sample in samples)
    return {"response/older_token_fraction": older / sum(len(s.response_ids) for s in samples)} if older else {}


def update_metrics(update: UpdateMetrics | None, phase: PhaseConfig) -> dict[str, float]:
    """The `policy/*`, `mismatch/*`, `pre_train/*` and `router/*` part of a step record, and `<name>/*` of additional
    objectives.

    The mismatch compares trainer and engine only where both condition on the prompt. In the pre-train space the gap is
    the one between log P(y) and log P(y|x), and is called so; the other mismatch metrics mean nothing there.
    """
    nothing_kept = {f"{name}/{count}": 0 for name in phase.objectives for count in ("kept_samples", "kept_tokens")}
    if update is None:  # the filters dropped every sample, or the critic learns alone: no step was taken
        return nothing_kept
    metrics = nothing_kept | update.flat()
    metrics |= {f"policy/{name}": metrics.pop(name) for name in ("grad_norm", "learning_rate")}
    total_loss = metrics.pop("loss")
    if len(phase.objectives) > 1:
        metrics["policy/total_loss"] = total_loss
    for name, objective in phase.objectives.items():
        prefix = "" if name == MAIN_OBJECTIVE else f"{name}/"
        mismatch = {key: metrics.pop(f"{name}/{key}", None) for key in (*MISMATCH_MEANS, *MISMATCH_MAXIMA)}
        if isinstance(objective.space, PreTrainSpaceConfig):
            mismatch, prefix = {"mean_log_prob_gap": mismatch["mean_log_prob_gap"]}, f"{prefix}pre_train/"
        else:
            prefix = f"{prefix}mismatch/"
        metrics |= {f"{prefix}{key}": value for key, value in mismatch.items() if value is not None}
    return metrics


def log_prob_gap_warning(record: Mapping[str, Any], limit: float) -> str | None:
    """What to print where a step's record says that trainer and engine log-probs differ by more than `limit` nat.

    Only where both had the same weights and the prompt in context: not with tokens of older weights.
    """
    gap = record.get("mismatch/mean_log_prob_gap")
    if gap is None or gap <= limit or "response/older_token_fraction" in record:
        return None
    return (
        f"warning: trainer and engine log-probs differ by {gap:.3g} nat on average, above "
        f"observability.max_log_prob_gap={limit:g}; the engine may hold other weights or another precision"
    )


def memory_metrics() -> dict[str, float]:
    """The `memory/*` part of a step record: the trainer process of rank 0 on its device, in GiB."""
    statistics = current_platform().memory_statistics()
    return {
        "memory/trainer_gib": statistics.allocated_bytes / 2**30,
        "memory/trainer_peak_gib": statistics.peak_bytes / 2**30,
    }
