"""Layouts that fit a number of GPUs, and the smallest number of GPUs for a run."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import get_args

from megatron_dsrl.config.layout import Problem, engine_problems, model_problems, process_problems
from megatron_dsrl.config.model import ParallelConfig, Recompute
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.plan import Plan, make_plan
from megatron_dsrl.planning.planned_run import PlannedRun

SIZES = (1, 2, 4, 8, 16)
MOST_GPUS = 4096
"""Where `fewest_gpus` gives up."""


def layout_problems(run: PlannedRun) -> list[Problem]:
    """Why processes, model and engines cannot be divided as configured; empty for a valid layout."""
    config, shape = run.config, run.architecture.shape
    return [
        *process_problems(config.parallel, run.world_size),
        *model_problems(config.parallel, shape),
        *engine_problems(config.engine.tensor_parallel_size, run.world_size, shape),
    ]


def suggest(run: PlannedRun, count: int) -> list[Plan]:
    """Layouts that fit, fastest first by the estimate; equally fast ones by how little they split the model.

    Each has as little recomputation as fits. If only the engine takes too much, its `memory_fraction` is lowered.
    Engines keep their tensor-parallel size if any layout with it fits.
    """

    def plan_with_fitting_engine(candidate: PlannedRun) -> Plan:
        """The candidate's plan, with a lower `engine.memory_fraction` if only that makes it fit."""
        plan = make_plan(candidate)
        fraction = plan.memory.largest_memory_fraction
        if plan.fits or not 0 < fraction < candidate.config.engine.memory_fraction:
            return plan
        return make_plan(candidate.with_fields("engine", memory_fraction=fraction))

    def with_least_recomputation(layout: PlannedRun) -> Plan | None:
        modes = get_args(Recompute)
        plans = (plan_with_fitting_engine(layout.with_fields("model", recompute=mode)) for mode in modes)
        return next((plan for plan in plans if plan.fits), None)

    for size in _engine_sizes(run):
        plans = map(with_least_recomputation, _layouts(run.with_fields("engine", tensor_parallel_size=size)))
        if fitting := [plan for plan in plans if plan is not None]:
            return sorted(fitting, key=_seconds_and_splitting)[:count]
    return []


def fewest_gpus(run: PlannedRun) -> int | None:
    """The smallest world size of the run's times a power of two for which a layout fits; None if none does."""
    while run.world_size <= MOST_GPUS:
        if suggest(run, count=1):
            return run.world_size
        run = replace(run, world_size=2 * run.world_size)
    return None


def overrides_of(plan: Plan, config: RunConfig) -> list[str]:
    """Overrides (`key.path=value` for `dsrl train`) that turn the configured layout into the plan's."""
    sections = {"parallel": ParallelConfig.model_fields, "model": ("recompute",)}
    sections["engine"] = ("tensor_parallel_size", "memory_fraction")
    return [
        f"{section}.{field}={planned if isinstance(planned, str) else json.dumps(planned)}"
        for section, fields in sections.items()
        for field in fields
        if (planned := getattr(getattr(plan.run.config, section), field)) != getattr(getattr(config, section), field)
    ]


def _layouts(run: PlannedRun) -> Iterator[PlannedRun]:
    """Valid layouts with tensor parallelism within a node and work for every replica."""
    for parallel in _parallel_sizes(run.config.parallel, run.architecture):
        candidate = replace(run, config=run.config.model_copy(update={"parallel": parallel}))
        if candidate.has_work and not layout_problems(candidate):
            yield candidate


def _engine_sizes(run: PlannedRun) -> list[int]:
    configured = run.config.engine.tensor_parallel_size
    sizes = [configured, *(size for size in SIZES[:4] if size != configured)]
    return [size for size in sizes if not list(engine_problems(size, run.world_size, run.architecture.shape))]


def _parallel_sizes(configured: ParallelConfig, architecture: Architecture) -> Iterator[ParallelConfig]:
    expert_sizes = SIZES if architecture.experts else (1,)
    for tensor, pipeline, context, expert in product(SIZES[:4], SIZES, SIZES[:4], expert_sizes):
        yield ParallelConfig(
            tensor_parallel_size=tensor,
            pipeline_parallel_size=pipeline,
            **_uneven_ends(architecture.num_hidden_layers, pipeline),
            context_parallel_size=context,
            expert_parallel_size=expert,
            expert_tensor_parallel_size=1 if expert > 1 else None,
            sequence_parallel=tensor > 1,
            distributed_optimizer=True,
            collective_timeout_seconds=configured.collective_timeout_seconds,
            distributed_timeout_seconds=configured.distributed_timeout_seconds,
        )


def _uneven_ends(layers: int, stages: int) -> dict[str, int]:
    """Layers of the first and last stage if the layers cannot be divided evenly: fewer than the others have, since
    these two also have the embedding and the head. Empty if they can, or if nothing would be left for the two."""
    between = -(-layers // stages)
    left = layers - between * (stages - 2)
    if stages == 1 or layers % stages == 0 or left < 2:
        return {}
    return {"layers_in_first_stage": left // 2, "layers_in_last_stage": left - left // 2}


def _seconds_and_splitting(plan: Plan) -> tuple[float, ...]:
    """Sort key of layouts: the fastest first; of equally fast ones, the one that splits the model less."""
    parallel = plan.run.config.parallel
    return (
        float(f"{plan.step_seconds:.2g}"),  # the precision of the estimate
        parallel.model_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_parallel_size,
    )
