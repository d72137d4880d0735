"""Everything about a run that can be checked in a second, before Megatron or SGLang is imported."""

import json
from collections.abc import Mapping
from itertools import repeat
from pathlib import Path

from megatron_dsrl.algorithms.schedule import Schedule, passes_of_phase
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.temporary_folder import require_short_temporary_folder
from megatron_dsrl.config.data import DataConfig, PromptSetConfig
from megatron_dsrl.config.derived import RunFigures, derive
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import find_config_json, how_to_make, is_hub_name, no_folder

_LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")


def preflight(config: RunConfig, world_size: int) -> RunFigures:
    """Check the run's layout against its model and data, and derive its figures.

    Reads only the model's config.json and the size of a local prompt file.

    Raises:
        UserError: the model or a local prompt file is missing or unreadable, the architecture is not supported, the
            layout does not fit (see `derive` and `check_models`), or the temporary folder's name is too long.
    """
    require_short_temporary_folder()
    architecture = read_architecture(find_config_json(config.model.path, config.made_by).parent)
    figures = derive(config, world_size, architecture.shape, count_training_prompts(config.data, config.made_by))
    check_models(config)
    return figures


def check_models(config: RunConfig) -> None:
    """Check that the phases use the configured critic and reference policy.

    Raises:
        UserError: the critic's warm-up includes a step that does not use it, its folder is missing, or the reference
            policy is to be refreshed but no phase has a KL term.
    """
    schedule, critic = Schedule(config.phases), config.critic
    steps = range(1, config.steps + 1)
    for step in range(1, critic.warmup_steps + 1):
        if step > config.steps or not passes_of_phase(schedule.at(step)).values:
            raise UserError(
                f"critic.warmup_steps: is {critic.warmup_steps}, but no critic learns in step {step}; choose an "
                "advantage that needs values for its phase (gae), or set it to 0"
            )
    require_model("critic.path", critic.path)
    reference = config.reference
    configured = reference.model_dump(exclude_defaults=True)
    if configured and not any(passes_of_phase(schedule.at(step)).reference_log_probs for step in steps):
        raise UserError(
            "reference: no phase has a `kl` section or the advantage `distillation`, so the run has no reference "
            f"policy; leave out {', '.join(configured)}"
        )
    require_model("reference.path", reference.path)
    if reference.url is not None and config.rollout.temperature != 1:
        raise UserError(
            f"reference.url: a server's log-probs are at temperature 1, but rollout.temperature is "
            f"{config.rollout.temperature:g}; set it to 1"
        )


def require_model(field: str, path: str | None) -> None:
    """
    Raises:
        UserError: the path of a further model is neither a folder nor a hub name.
    """
    if path is not None and not is_hub_name(path) and not Path(path).expanduser().is_dir():
        raise no_folder(field, path)


def count_prompts(data: PromptSetConfig, made_by: Mapping[str, str] = {}, section: str = "data") -> int | None:
    """Rows of a local file, at most `data.limit`; None for what must be loaded to be counted, such as a hub name.

    Raises UserError when the local file is missing, unreadable or empty.
    """
    path = Path(data.source).expanduser()
    if path.suffix not in _LOCAL_SUFFIXES or "*" in path.name or data.rows_field is not None:
        return None
    if not path.is_file():
        advice = how_to_make(data.source, made_by) or "make it first, or correct the path"
        raise UserError(f"{section}.source: no such file: {data.source}; {advice}")
    try:
        rows = _count_rows(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{section}.source: cannot read {data.source}: {error}") from error
    if rows == 0:
        raise UserError(f"{section}.source: {data.source} holds no rows")
    return rows if data.limit is None else min(rows, data.limit)


def count_training_prompts(data: DataConfig, made_by: Mapping[str, str] = {}) -> int | None:
    """As `count_prompts`; None also for a mixture, whose sets have their own epochs, and for filtered prompts."""
    sections = ["data", *(f"data.mixed_with.{position}" for position in range(len(data.mixed_with)))]
    counts = [count_prompts(*each) for each in zip(data.sets, repeat(made_by), sections)]  # all must exist
    return None if len(counts) > 1 or data.filters_by_pass_rate else counts[0]


def _count_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return sum(1 for line in file if line.strip())
        rows = json.load(file)
    if not isinstance(rows, list):
        raise ValueError("expected a JSON list of rows")
    return len(rows)
