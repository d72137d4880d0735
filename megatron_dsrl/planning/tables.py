"""A plan as tables for people."""

from rich.console import Console
from rich.table import Table

from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.compute import Assumptions
from megatron_dsrl.planning.memory import RESERVE_BYTES
from megatron_dsrl.planning.plan import Plan, largest_micro_batch, largest_response

GIB = 2**30


def print_plan(plan: Plan, architecture: Architecture, assumptions: Assumptions, console: Console) -> None:
    """Memory, time, limits, and whether the run fits."""
    console.print(_memory_table(plan))
    console.print(_time_table(plan, assumptions))
    micro_batch, response = largest_micro_batch(plan, architecture), largest_response(plan, architecture)
    console.print(f"largest actor.max_tokens_per_micro_batch that fits: {_tokens(micro_batch)}")
    console.print(f"largest rollout.max_response_tokens that fits: {_tokens(response)}")
    console.print("This run fits." if plan.fits else "[bold]This run does not fit.[/bold]")


def print_suggestions(plans: list[Plan], console: Console) -> None:
    """Layouts, the fastest first."""
    if not plans:
        console.print("No layout fits: take more GPUs, or lower engine.memory_fraction or the lengths.")
        return
    table = Table(
        "tensor", "pipeline", "context", "expert", "recompute", "peak GiB", "update s", "generation s",
        title="layouts that fit, with sequence parallelism and distributed optimizer",
    )  # fmt: skip
    for plan in plans:
        parallel = plan.config.parallel
        table.add_row(
            str(parallel.tensor_parallel_size),
            str(parallel.pipeline_parallel_size),
            str(parallel.context_parallel_size),
            str(parallel.expert_parallel_size),
            plan.config.model.recompute,
            f"{max(plan.peak_training, plan.peak_switch, plan.peak_generation) / GIB:.1f}",
            f"{plan.training_seconds:.0f}",
            f"{plan.generation_seconds:.0f}",
        )
    console.print(table)


def _memory_table(plan: Plan) -> Table:
    stages = range(len(plan.stages))
    table = Table(
        "GiB per GPU", *(f"stage {stage}" for stage in stages) if len(plan.stages) > 1 else ["every GPU"],
        title=f"{plan.world_size} x {plan.gpu.name}, {plan.gpu.memory_bytes / GIB:.0f} GiB each",
    )  # fmt: skip
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        table.add_row(name, *(f"{getattr(stage, name) / GIB:.2f}" for stage in plan.stages))
    engine = plan.engine
    table.add_row("engine weights", *[f"{engine.weights / GIB:.2f}"] * len(stages))
    table.add_row(f"engine cache ({engine.cache_tokens:,} tokens)", *[f"{engine.cache / GIB:.2f}"] * len(stages))
    table.add_row("reserve (context, allocator, NCCL)", *[f"{RESERVE_BYTES / GIB:.2f}"] * len(stages))
    for name, peak in (
        ("peak of an update", plan.peak_training),
        ("peak of the switch (weight push)", plan.peak_switch),
        ("peak of generation", plan.peak_generation),
    ):
        note = "" if peak <= plan.gpu.memory_bytes else "  too much"
        table.add_row(f"[bold]{name}[/bold]", f"[bold]{peak / GIB:.2f}{note}[/bold]", *[""] * (len(stages) - 1))
    return table


def _time_table(plan: Plan, assumptions: Assumptions) -> Table:
    rollout = plan.config.rollout
    table = Table("one step", "value", "made of")
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    table.add_row("samples", f"{samples:,}", f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt}")
    table.add_row("mean response, tokens", f"{assumptions.mean_response_tokens:,}", "assumed")
    table.add_row("update, PFLOP", f"{plan.training_flops / 1e15:,.1f}", "forward and backward")
    table.add_row(
        "update, s", f"{plan.training_seconds:,.0f}", f"assumed: {assumptions.training_utilisation:.0%} of the peak"
    )
    table.add_row(
        "generation, s",
        f"{plan.generation_seconds:,.0f}",
        f"assumed: {assumptions.bandwidth_utilisation:.0%} of the memory bandwidth; without the slowest samples' tail",
    )
    steps = plan.config.steps
    table.add_row("whole run, h", f"{steps * plan.step_seconds / 3600:,.1f}", f"{steps} steps")
    return table


def _tokens(count: int | None) -> str:
    return "none" if count is None else f"{count:,}"
