"""Tables of `dsrl plan`."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from megatron_dsrl.common.numbers import counted
from megatron_dsrl.config.layout import Problem
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.run import Due, RunConfig
from megatron_dsrl.planning.fit import ENGINE_RELEASED_BYTES, ENGINE_WORK_BYTES, RESERVE_BYTES, gib
from megatron_dsrl.planning.host_memory import HostMemory
from megatron_dsrl.planning.layouts import overrides_of
from megatron_dsrl.planning.parameters import adapter_parameters_of_stage, parameters_of_model
from megatron_dsrl.planning.plan import Plan, RunFiles, largest_length, run_files
from megatron_dsrl.planning.planned_run import PlannedRun

GIB = 2**30


def print_plan(plan: Plan, console: Console) -> None:
    """Print memory, time, limits, and whether the run fits."""
    config, architecture = plan.run.config, plan.run.architecture
    console.print(_memory_table(plan))
    if lora := config.actor.lora:
        adapters = adapter_parameters_of_stage(architecture, ParallelConfig(), 0, lora).total
        total = parameters_of_model(architecture)
        share = f"LoRA trains {adapters:,} parameters beside the model's {total:,} ({adapters / total:.2%})"
        console.print(share, highlight=False)
    console.print(_time_table(plan))
    console.print(_rest_of_the_run(config, run_files(config, architecture)), soft_wrap=True, highlight=False)
    for section, field in (("actor", "max_tokens_per_micro_batch"), ("rollout", "max_response_tokens")):
        largest = largest_length(plan.run, section, field)
        console.print(f"largest {section}.{field} that fits: {f'{largest:,}' if largest else 'none'}")
    if plan.memory.engines_elsewhere:
        console.print("The engines are on other devices (engine.urls): their memory is not counted.")
    else:
        console.print(f"largest engine.memory_fraction that fits: {plan.memory.largest_memory_fraction or 'none'}")
    for problem in plan.memory.problems:
        console.print(f"- {problem}", soft_wrap=True)
    console.print("This run fits." if plan.fits else "[bold]This run does not fit.[/bold]")


def print_impossible_layout(problems: Sequence[Problem], gpus: int, console: Console) -> None:
    """Print why the configured layout is not possible on this number of GPUs."""
    console.print(f"[bold]The configured layout is not possible on {counted(gpus, 'GPU')}:[/bold]", highlight=False)
    for fields, what in problems:
        console.print(f"- {fields}: {what}", highlight=False, markup=False)


def print_suggestions(run: PlannedRun, plans: Sequence[Plan], needed_gpus: int | None, console: Console) -> None:
    """Print layouts for the run, the fastest first, and the overrides of `dsrl train` for the fastest; without any
    layout, the smallest number of GPUs that has one, if known."""
    if not plans:
        advice = "lower the lengths, or move parts of the trainer to the host (actor.offload)."
        if needed_gpus is not None:
            advice = f"{needed_gpus} would be enough; or {advice}"
        console.print(f"No layout fits {counted(run.world_size, 'GPU')}: {advice}", highlight=False)
        return
    console.print(_suggestions_table(run, plans))
    if overrides := overrides_of(plans[0], run.config):
        console.print("The first of them as overrides, to paste after `dsrl train CONFIG.yaml`:")
        console.print(pasteable(overrides, console.width), highlight=False, markup=False, soft_wrap=True)
    else:
        console.print("The first of them is the configured one.")


def _suggestions_table(run: PlannedRun, plans: Sequence[Plan]) -> Table:
    """Expert parallelism and the engine's size are left out if they are the default in every row."""
    configs = [plan.run.config for plan in plans]
    columns: dict[str, list[str]] = {
        "TP": [str(config.parallel.tensor_parallel_size) for config in configs],
        "PP": [_pipeline(config.parallel) for config in configs],
        "CP": [str(config.parallel.context_parallel_size) for config in configs],
        "EP": [str(config.parallel.expert_parallel_size) for config in configs],
        "engine\nTP": [str(config.engine.tensor_parallel_size) for config in configs],
        "recompute": [config.model.recompute for config in configs],
        "engine\nmemory": [f"{config.engine.memory_fraction:g}" for config in configs],
        "peak\nGiB": [f"{max(plan.memory.peaks.values()) / GIB:.1f}" for plan in plans],
        "update\ns": [f"{plan.training_seconds:.0f}" for plan in plans],
        "generate\ns": [f"{plan.generation_seconds:.0f}" for plan in plans],
    }
    if set(columns["EP"]) == {"1"}:
        del columns["EP"]
    if set(columns["engine\nTP"]) == {str(run.config.engine.tensor_parallel_size)}:
        del columns["engine\nTP"]
    table = Table(
        *columns,
        title=f"layouts that fit {counted(run.world_size, 'GPU')}, the fastest first",
        caption="TP, PP, CP, EP: tensor (with sequence), pipeline, context and expert parallel; all with the "
        "distributed optimizer",
    )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def pasteable(words: Sequence[str], width: int) -> str:
    """Arguments of a command, wrapped to `width` into indented lines that the shell joins."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 7 > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(f"    {line}" for line in lines)


def _pipeline(parallel: ParallelConfig) -> str:
    """The pipeline size, and the layers of the end stages if they differ from the others."""
    ends = (parallel.layers_in_first_stage, parallel.layers_in_last_stage)
    return f"{parallel.pipeline_parallel_size}" + (f", ends\n{ends[0]}, {ends[1]}" if any(ends) else "")


def _memory_table(plan: Plan) -> Table:
    memory, engine = plan.memory, plan.memory.engine
    columns = _stage_columns(len(memory.policy))
    table = Table(
        "GiB per GPU", *columns,
        title=f"{plan.run.world_size} x {plan.run.gpu.name}, {plan.run.gpu.memory_bytes / GIB:.0f} GiB each",
    )  # fmt: skip

    def row(name: str, *sizes: int) -> None:
        """`sizes`: by pipeline stage, or one for all."""
        cells = [max(sizes[stages]) if len(sizes) > 1 else sizes[0] for stages in columns.values()]
        table.add_row(name, *(f"{size / GIB:.2f}" for size in cells))

    for prefix, model in (("", memory.policy), ("critic: ", memory.critic)):
        if model:
            for name in ("weights", "gradients", "optimizer"):
                row(f"{prefix}{name}", *(getattr(stage, name) for stage in model))
            recompute = plan.run.config.model.recompute
            row(f"{prefix}activations, recompute {recompute}", *(stage.activations for stage in model))
            if any(stage.recomputed for stage in model):
                row(f"{prefix}recomputed, of one layer", *(stage.recomputed for stage in model))
            row(f"{prefix}value head" if prefix else "logits", *(stage.logits for stage in model))
    if not memory.engines_elsewhere:
        row("engine weights", engine.weights)
        row(f"engine cache ({engine.cache_tokens:,} tokens)", engine.cache)
        row("engine work space, assumed", ENGINE_WORK_BYTES)
        row("engine while released, assumed", ENGINE_RELEASED_BYTES)
        row("weight push: buckets", memory.sync_buckets)
    if any(memory.gathered_on_device):
        row("checkpoint: gathered optimizer state", *memory.gathered_on_device)
    row("reserve (context, allocator, NCCL)", RESERVE_BYTES)
    for name, peak in memory.peaks.items():
        note = "" if peak <= memory.capacity else "  too much"
        others = [""] * (len(columns) - 1)
        table.add_row(f"[bold]peak of {name}[/bold]", f"[bold]{peak / GIB:.2f}{note}[/bold]", *others)
    _add_host_rows(memory.host, row)
    return table


def _stage_columns(stages: int) -> dict[str, slice]:
    """Titles and pipeline stages of the columns: one per stage, or if that would be too wide, the first, the largest
    of those between, and the last."""
    if stages == 1:
        return {"every GPU": slice(0, 1)}
    if stages <= 4:
        return {f"stage {stage}": slice(stage, stage + 1) for stage in range(stages)}
    last = stages - 1
    between = f"stages 1-{last - 1},\nat most"
    return {"stage 0": slice(0, 1), between: slice(1, last), f"stage {last}": slice(last, stages)}


def _add_host_rows(memory: HostMemory, row: Callable[..., None]) -> None:
    """Add rows for host memory. `row` gets a title, and sizes as in `_memory_table`."""
    for what, sizes in (
        ("reference policy", memory.reference),
        ("what actor.offload moves", memory.offloaded),
        ("checkpoint copy, at most", memory.checkpoint),
        ("checkpoint, gathered", memory.gathered),
        ("routing replay, at most", (memory.routed_experts,)),
    ):
        if any(sizes):
            row(f"on the host: {what}", *sizes)


def _time_table(plan: Plan) -> Table:
    rollout, assumptions = plan.run.config.rollout, plan.run.assumptions
    table = Table("one step", "value", "made of")
    table.add_row(
        "samples", f"{rollout.samples_per_step:,}", f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt}"
    )
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
    if rollout.max_staleness:
        steps += ", sampling beside the update"
    table.add_row("whole run, h", f"{plan.run_seconds / 3600:,.1f}", steps)
    return table


def _rest_of_the_run(config: RunConfig, files: RunFiles) -> str:
    """What the run takes besides its steps: evaluations and disk."""
    due, sets = Due(config), config.evaluation.sets
    evaluations = sum(due.evaluate(step) for step in range(config.steps + 1)) if sets else 0
    of_sets = f" ({', '.join(one.name for one in sets)})" if sets else ""
    kept = f"checkpoints {files.checkpoints} x {gib(files.checkpoint_bytes)}"
    kept += f", exports {files.exports} x {gib(files.export_bytes)}"
    return f"not in these hours: {counted(evaluations, 'evaluation')}{of_sets}\non disk: {kept}; and samples and logs"
