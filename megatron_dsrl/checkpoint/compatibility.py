"""Check that a run folder belongs to the run that is being started."""

import json
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from megatron_dsrl.checkpoint.state import ProcessLayout
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.run import RunConfig

OF_A_REWARD = ("workers", "timeout_seconds", "memory_megabytes", "max_consecutive_errors")
MAY_CHANGE = (
    "made_by",
    "name",
    "output_dir",
    "model.recompute",
    "model.layer_spec",
    "parallel",
    "actor.max_tokens_per_micro_batch",
    "actor.kept_logits_megabytes",
    "actor.cpu_threads",
    "actor.offload",
    "reference.timeout_seconds",
    "reference.concurrency",
    *(f"reward.{field}" for field in OF_A_REWARD),
    *(f"data.mixed_with.*.reward.{field}" for field in OF_A_REWARD),
    "rollout.step_timeout_seconds",
    "rollout.request_timeout_seconds",
    "rollout.request_attempts",
    "rollout.replay_from",
    "engine",
    "evaluation",
    "checkpoint",
    "observability",
)
"""Fields that may change when a run is continued: where and how it runs, not what it computes."""


def check_same_run(before: dict[str, Any], config: RunConfig, where: str) -> None:
    """Compare the configuration with the one the run was started with. Raises UserError if fields that affect the
    result differ; the message names all of them.

    Args:
        before: the resolved configuration of the existing run.
        where: name of the existing run, for the message.
    """
    now = config.model_dump(mode="json")
    may_change: tuple[str, ...] = MAY_CHANGE
    # With decay, the learning rate of every step depends on the number of steps.
    if config.optimizer.decay == config.critic.optimizer.decay == "constant":
        may_change += ("steps",)
    changed = [
        f"  {path}: {old!r} there, {new!r} now"
        for path, old, new in _differences(_with_defaults(before), now)
        if not any(fnmatchcase(path, field) or fnmatchcase(path, f"{field}.*") for field in may_change)
        and not (path == "reference.url" and old and new)  # the server is at another address
    ]
    if changed:
        raise UserError(
            f"{where} holds a run with a different configuration, so it cannot be continued with this one:\n"
            + "\n".join(changed)
            + "\nchoose another `name`, or remove the folder"
        )


def check_same_model(before: dict[str, Any], model: dict[str, Any], where: str) -> None:
    """Compare the model with the one a checkpoint was written from. Raises UserError if the models differ; the message
    names all differences."""
    changed = [f"{path} is {old!r} there and {new!r} here" for path, old, new in _differences(before, model)]
    if changed:
        raise UserError(f"{where} belongs to a different model than model.path: " + "; ".join(changed))


def check_same_optimizer(before: ProcessLayout, parallel: ParallelConfig, where: str) -> None:
    """Check that the optimizer state of a checkpoint can be loaded.

    Megatron stores the state in different formats for its two kinds of optimizer, and with and without expert
    parallelism. Raises UserError if the checkpoint was written in the other format.
    """
    if (before.expert_parallel_size > 1) != (parallel.expert_parallel_size > 1):
        raise UserError(
            f"{where} was written with parallel.expert_parallel_size={before.expert_parallel_size}; continue with "
            + ("a size above 1" if before.expert_parallel_size > 1 else "1")
        )
    if before.distributed_optimizer != parallel.distributed_optimizer:
        raise UserError(
            f"{where} was written with parallel.distributed_optimizer={str(before.distributed_optimizer).lower()}; "
            "continue with the same setting"
        )


def _with_defaults(before: dict[str, Any]) -> dict[str, Any]:
    """Add fields that did not exist when the run was started, with their default values."""
    try:
        return RunConfig.model_validate_json(json.dumps(before)).model_dump(mode="json")
    except ValidationError:  # a field no longer exists: compared as it is, and named in the message
        return before


def _differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) of all differences between two trees; a missing field counts as None."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [d for key in keys for d in _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [d for i, pair in enumerate(zip(before, now)) for d in _differences(*pair, f"{path}.{i}")]
    return [] if before == now else [(path, before, now)]
