"""Tables of `dsrl plan --scale`: a run from few to many GPUs."""

from collections.abc import Sequence
from dataclasses import fields

from rich.console import Console
from rich.table import Column, Table

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.compute import Assumptions
from megatron_dsrl.planning.gpus import Gpu
from megatron_dsrl.planning.layouts import layout_problems
from megatron_dsrl.planning.scale import PARTS, Costs, StepEstimate, estimate_step, first_limit, with_batch_for

DURING_GENERATION = ("decoding", "longest_response", "reading", "judging")


def print_scale(
    config: RunConfig,
    architecture: Architecture,
    gpu: Gpu,
    world_sizes: Sequence[int],
    assumptions: Assumptions,
    console: Console,
) -> None:
    """Print tables for a batch that grows with the GPUs and for a constant one, the first limit, and the constants.

    Raises:
        UserError: a number of GPUs is not a multiple of the first one, or does not fit the layout.
    """
    costs = Costs()
    growing, same = [], []
    for world_size in world_sizes:
        if world_size % world_sizes[0] or layout_problems(config, architecture, world_size):
            raise UserError(
                f"--scale: {world_size} GPUs cannot be divided into this layout or into groups of {world_sizes[0]}; "
                "choose other numbers"
            )
        larger = with_batch_for(config, world_size // world_sizes[0])
        growing.append(estimate_step(larger, architecture, gpu, world_size, assumptions, costs))
        same.append(estimate_step(config, architecture, gpu, world_size, assumptions, costs))
    console.print(_table("the batch grows with the GPUs", growing))
    console.print(_table("the batch stays", [each for each in same if _has_work(config, each)]))
    limit = first_limit(growing)
    if limit:
        world_size, part = limit
        console.print(f"Breaks first as the batch grows: {PARTS[part]}, at {world_size:,} GPUs.", highlight=False)
    else:
        console.print("Nothing breaks up to here.")
    console.print(_constants_table(costs, assumptions))


def _has_work(config: RunConfig, estimate: StepEstimate) -> bool:
    """Whether every data-parallel replica has a sample in every optimizer step."""
    replicas = estimate.world_size // config.parallel.model_parallel_size
    return estimate.samples // config.actor.mini_batches_per_rollout >= replicas


def _table(title: str, estimates: Sequence[StepEstimate]) -> Table:
    table = Table("seconds of a step", *(f"{each.world_size:,} GPUs" for each in estimates), title=title)
    table.add_row("samples", *(f"{each.samples:,}" for each in estimates))
    table.add_row("generation", *(f"{each.generation:,.1f}" for each in estimates))
    for part, words in PARTS.items():
        name = f"  {words}" if part in DURING_GENERATION else words
        table.add_row(name, *(f"{getattr(each, part):,.1f}" for each in estimates))
    table.add_row("[bold]step[/bold]", *(f"[bold]{each.step:,.0f}[/bold]" for each in estimates))
    table.add_row("tokens per GPU and second", *(f"{each.tokens_per_gpu_second:,.0f}" for each in estimates))
    table.add_row("hours between failures", *(f"{each.hours_between_failures:,.0f}" for each in estimates))
    return table


def _constants_table(costs: Costs, assumptions: Assumptions) -> Table:
    table = Table("constant", "value", Column("source", overflow="fold"), title="what it rests on")
    table.add_row("mean response, tokens", f"{assumptions.mean_response_tokens:,}", "assumed")
    table.add_row("training", f"{assumptions.training_utilisation:.0%} of the peak", "assumed")
    table.add_row("decoding", f"{assumptions.bandwidth_utilisation:.0%} of the memory bandwidth", "assumed")
    for each in fields(costs):
        value = f"{getattr(costs, each.name):.3g} {each.metadata['unit']}".strip()
        table.add_row(each.name.replace("_", " "), value, each.metadata["source"])
    return table
