"""A plan as tables for people."""

from rich.console import Console
from rich.table import Table

from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.compute import Assumptions
from megatron_dsrl.planning.fit import ENGINE_WORK_BYTES, RESERVE_BYTES, RunMemory
from megatron_dsrl.planning.plan import Plan, largest_micro_batch, largest_response

GIB = 2**30


def print_plan(plan: Plan, architecture: Architecture, assumptions: Assumptions, console: Console) -> None:
    """Memory, time, limits, and whether the run fits."""
    console.print(_memory_table(plan))
    console.print(_time_table(plan, assumptions))
    micro_batch, response = largest_micro_batch(plan, architecture), largest_response(plan, architecture)
    console.print(f"largest actor.max_tokens_per_micro_batch that fits: {_tokens(micro_batch)}")
    console.print(f"largest rollout.max_response_tokens that fits: {_tokens(response)}")
    if plan.memory.engines_elsewhere:
        console.print("The engines are on other devices (engine.urls): their memory is not counted.")
    else:
        console.print(f"largest engine.memory_fraction that fits: {plan.memory.largest_memory_fraction or 'none'}")
    for problem in plan.memory.problems:
        console.print(f"- {problem}", soft_wrap=True)
    console.print("This run fits." if plan.fits else "[bold]This run does not fit.[/bold]")


def print_suggestions(plans: list[Plan], console: Console) -> None:
    """Layouts, the fastest first."""
    if not plans:
        console.print("No layout fits: take more GPUs, or lower the lengths.")
        return
    table = Table(
        "tensor", "pipeline", "context", "expert", "recompute", "engine.memory_fraction", "peak GiB", "update s",
        "generation s",
        title="layouts that fit, with sequence parallelism and distributed optimizer",
    )  # fmt: skip
    for plan in plans:
        parallel = plan.config.parallel
        table.add_row(
            str(parallel.tensor_parallel_size),
            _pipeline(parallel),
            str(parallel.context_parallel_size),
            str(parallel.expert_parallel_size),
            plan.config.model.recompute,
            f"{plan.config.engine.memory_fraction:g}",
            f"{max(plan.memory.peaks.values()) / GIB:.1f}",
            f"{plan.training_seconds:.0f}",
            f"{plan.generation_seconds:.0f}",
        )
    console.print(table)


def _pipeline(parallel: ParallelConfig) -> str:
    """Its size, and how many layers the ends have where that is not what the others have."""
    ends = (parallel.layers_in_first_stage, parallel.layers_in_last_stage)
    return f"{parallel.pipeline_parallel_size}" + (f" (ends {ends[0]}, {ends[1]})" if any(ends) else "")


def _memory_table(plan: Plan) -> Table:
    memory, engine = plan.memory, plan.memory.engine
    stages = len(memory.policy)
    table = Table(
        "GiB per GPU", *(f"stage {stage}" for stage in range(stages)) if stages > 1 else ["every GPU"],
        title=f"{plan.world_size} x {plan.gpu.name}, {plan.gpu.memory_bytes / GIB:.0f} GiB each",
    )  # fmt: skip

    def row(name: str, *sizes: int) -> None:
        table.add_row(name, *(f"{size / GIB:.2f}" for size in (sizes if len(sizes) > 1 else sizes * stages)))

    for prefix, model in (("", memory.policy), ("critic: ", memory.critic)):
        if model:
            for name in ("weights", "gradients", "optimizer"):
                row(f"{prefix}{name}", *(getattr(stage, name) for stage in model))
            recompute = plan.config.model.recompute
            row(f"{prefix}activations, recompute {recompute}", *(stage.activations for stage in model))
            if any(stage.recomputed for stage in model):
                row(f"{prefix}recomputed, of one layer", *(stage.recomputed for stage in model))
            row(f"{prefix}value head" if prefix else "logits", *(stage.logits for stage in model))
    if not memory.engines_elsewhere:
        row("engine weights", engine.weights)
        row(f"engine cache ({engine.cache_tokens:,} tokens)", engine.cache)
        row("engine work space, assumed", ENGINE_WORK_BYTES)
        row("weight push: buckets", memory.sync_buckets)
    row("reserve (context, allocator, NCCL)", RESERVE_BYTES)
    for name, peak in memory.peaks.items():
        note = "" if peak <= memory.capacity else "  too much"
        table.add_row(f"[bold]peak of {name}[/bold]", f"[bold]{peak / GIB:.2f}{note}[/bold]", *[""] * (stages - 1))
    _add_host_rows(memory, row)
    return table


def _add_host_rows(memory: RunMemory, row) -> None:
    """What its process keeps in host memory."""
    if any(memory.reference_on_host):
        row("on the host: reference policy", *memory.reference_on_host)
    if any(memory.offloaded_on_host):
        row("on the host: what actor.offload moves", *memory.offloaded_on_host)
    if any(memory.checkpoint_on_host):
        row("on the host: checkpoint copy, at most", *memory.checkpoint_on_host)
    if memory.routed_experts_on_host:
        row("on the host: routing replay, at most", memory.routed_experts_on_host)


def _time_table(plan: Plan, assumptions: Assumptions) -> Table:
    rollout = plan.config.rollout
    table = Table("one step", "value", "made of")
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    table.add_row("samples", f"{samples:,}", f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt}")
    table.add_row("mean response, tokens", f"{assumptions.mean_response_tokens:,}", "assumed")
    for phase in plan.phases:
        table.add_row(f"{phase.name}: update, PFLOP", f"{phase.flops / 1e15:,.1f}", "its passes, forward and backward")
        table.add_row(
            f"{phase.name}: update, s", f"{phase.seconds:,.0f}",
            f"assumed: {assumptions.training_utilisation:.0%} of the peak",
        )  # fmt: skip
    table.add_row(
        "generation, s",
        f"{plan.generation_seconds:,.0f}",
        f"assumed: {assumptions.bandwidth_utilisation:.0%} of the memory bandwidth; without the slowest samples' tail",
    )
    steps = " + ".join(f"{phase.steps} {phase.name}" for phase in plan.phases) + " steps"
    if plan.config.rollout.sample_ahead:
        steps += ", sampling beside the update"
    table.add_row("whole run, h", f"{plan.run_seconds / 3600:,.1f}", steps)
    return table


def _tokens(count: int | None) -> str:
    return "none" if count is None else f"{count:,}"
