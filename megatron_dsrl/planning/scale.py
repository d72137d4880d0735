"""Estimated seconds of a step from one node to thousands of GPUs, and the first part that stops scaling.

The layout of one model stays the same, and more GPUs mean more data parallelism. There are two cases. If the batch
grows with the GPUs (`with_batch_for`), every part whose time grows limits scaling; if the batch stays the same, every
part whose time does not shrink does. No run of this size has been made; the constants below name their sources.

Parts of a step, one after the other (with `rollout.max_staleness`, generation runs beside update and gradients):

- generation: the longest of four overlapping parts: decoding (compute.py), the longest response alone in its engine,
  reading the answers on rank 0, and judging them there;
- sharing: rank 0 pickles the batch and sends it over gloo's tree, every rank unpickles all of it;
- update: operations over all GPUs (compute.py);
- gradients: reduce-scatter of fp32 gradients and all-gather of bf16 parameters by rings over data parallelism, without
  overlap;
- weight push: every GPU receives the whole model and its engine copies it, all engines at the same time.

Not included: stragglers among the nodes, network contention between rings, start-up, checkpoints.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from rich.console import Console
from rich.table import Column, Table

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.phase import phases_by_steps
from megatron_dsrl.planning.compute import generation_seconds, phase_flops, training_seconds
from megatron_dsrl.planning.layouts import layout_problems
from megatron_dsrl.planning.memory import element_bytes, engine_memory, policy_memory
from megatron_dsrl.planning.parameters import parameters_of_model
from megatron_dsrl.planning.planned_run import Assumptions, PlannedRun

MEASURED = "measured on one CPU core by tools/benchmark_controller.py"
NOTICEABLE = 0.1
"""A part counts as a limit when it has grown by this share of the first step."""


def _constant(value: float, unit: str, source: str) -> float:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Costs:
    """Constants of the estimate; each field's metadata has its unit and source."""

    read_seconds: float = _constant(335e-9, "s per response token, rank 0; decoding included", MEASURED)
    read_json_seconds: float = _constant(734e-9, "s per response token, rank 0, with engine.urls", MEASURED)
    pickle_seconds: float = _constant(7e-9, "s per token, rank 0", MEASURED)
    unpickle_seconds: float = _constant(17e-9, "s per token, every rank", MEASURED)
    shared_bytes: float = _constant(8.0, "bytes per token", MEASURED)
    gloo_bytes_per_second: float = _constant(
        2.35e9, "bytes/s", "measured between two processes of one machine; assumed between nodes too"
    )
    verify_seconds: float = _constant(
        4e-3, "s per response", "measured for math_verify on MATH-500: 3 to 5 ms; `boxed` takes less"
    )
    push_bytes_per_second: float = _constant(
        8.7e9, "bytes/s", "reported for slime with the same transport: 61 GB in 7 s on 8 H100 (hebiao064.github.io)"
    )
    network_bytes_per_second: float = _constant(
        35e9, "bytes/s per GPU", "assumed: 70 % of one 400 Gb/s port per GPU (DGX H100 data sheet)"
    )
    node_bytes_per_second: float = _constant(
        300e9, "bytes/s per GPU", "assumed: two thirds of NVLink's 450 GB/s (H100 data sheet)"
    )
    hop_seconds: float = _constant(10e-6, "s per hop of a ring", "assumed")
    gpus_per_node: float = _constant(8, "", "DGX H100 data sheet")
    failures_per_gpu_hour: float = _constant(
        419 / (54 * 24 * 16384), "", "419 interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, table 5)"
    )


@dataclass(frozen=True)
class StepEstimate:
    """Estimate of a step on `world_size` GPUs; times in seconds."""

    world_size: int
    samples: int
    tokens: float
    """Response tokens, over all GPUs."""
    decoding: float
    longest_response: float
    reading: float
    judging: float
    sharing: float
    update: float
    gradients: float
    weight_push: float
    hours_between_failures: float
    is_asynchronous: bool = False
    """`rollout.max_staleness` above 0."""

    @property
    def generation(self) -> float:
        """The longest of the overlapping parts."""
        return max(getattr(self, part) for part in DURING_GENERATION)

    @property
    def step(self) -> float:
        together = max if self.is_asynchronous else sum
        return together((self.generation, self.update + self.gradients)) + self.sharing + self.weight_push

    @property
    def tokens_per_gpu_second(self) -> float:
        """Tokens generated and trained on per GPU and second."""
        return self.tokens / self.step / self.world_size


PARTS = {
    "decoding": "decoding",
    "longest_response": "the longest response, alone in its engine",
    "reading": "rank 0 reading the engines' answers",
    "judging": "rank 0's verifiers (reward.workers)",
    "sharing": "rank 0 sending the batch to every rank",
    "update": "forward and backward",
    "gradients": "gradient exchange",
    "weight_push": "weight push",
}
"""Fields of `StepEstimate` and their descriptions."""
DURING_GENERATION = ("decoding", "longest_response", "reading", "judging")
"""The overlapping parts."""


def estimate_step(run: PlannedRun, costs: Costs) -> StepEstimate:
    """Estimate a step of the run's most expensive phase. Its layout must be valid."""
    config, architecture, world_size = run.config, run.architecture, run.world_size
    samples = config.rollout.samples_per_step
    tokens = samples * run.assumptions.mean_response_tokens
    engine = engine_memory(config, architecture, run.gpu.memory_bytes)
    forms = [form for phase in phases_by_steps(config.phases, config.steps) if phase.steps for form in phase.forms]
    flops = max(phase_flops(run, form) for form in forms)
    decoding_step = engine.weights / (run.gpu.bytes_per_second * run.assumptions.bandwidth_utilisation)
    rounds = math.ceil(math.log2(world_size)) if world_size > 1 else 0
    model_bytes = parameters_of_model(architecture) * element_bytes(config.model)
    return StepEstimate(
        world_size=world_size,
        samples=samples,
        tokens=tokens,
        decoding=generation_seconds(run, engine),
        longest_response=config.rollout.max_response_tokens * decoding_step,
        reading=tokens * (costs.read_json_seconds if config.engine.urls else costs.read_seconds),
        judging=samples * costs.verify_seconds / config.reward.workers,
        sharing=tokens * (costs.pickle_seconds + costs.unpickle_seconds)
        + rounds * tokens * costs.shared_bytes / costs.gloo_bytes_per_second,
        update=training_seconds(run, flops),
        gradients=_gradient_seconds(run, costs),
        weight_push=model_bytes / costs.push_bytes_per_second,
        hours_between_failures=1 / (world_size * costs.failures_per_gpu_hour),
        is_asynchronous=config.rollout.max_staleness > 0,
    )


def _gradient_seconds(run: PlannedRun, costs: Costs) -> float:
    """Gradient exchange of all optimizer steps of a rollout batch, on the fullest pipeline stage."""
    config, world_size, parallel = run.config, run.world_size, run.config.parallel
    replicas = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    stages = range(parallel.pipeline_parallel_size)
    element = element_bytes(config.model)
    parameters = max(policy_memory(config, run.architecture, world_size, stage).trained // element for stage in stages)
    within_node = world_size <= costs.gpus_per_node
    bandwidth = costs.node_bytes_per_second if within_node else costs.network_bytes_per_second
    sent = (4 + element) * parameters * (replicas - 1) / replicas
    hops = 2 * (replicas - 1)
    return config.actor.optimizer_steps_per_rollout * (sent / bandwidth + hops * costs.hop_seconds)


def with_batch_for(run: PlannedRun, factor: int) -> PlannedRun:
    """The run with `factor` times as many prompts per step."""
    return run.with_fields("rollout", prompts_per_step=run.config.rollout.prompts_per_step * factor)


def first_limit(estimates: Sequence[StepEstimate]) -> tuple[int, str] | None:
    """World size at which a part first stops scaling as the batch grows with the GPUs, and that part (key of `PARTS`).

    It is the part that lengthens the step most, if by at least a tenth of the first step. None if no part does.

    Args:
        estimates: ordered by number of GPUs, with the batch growing in proportion.
    """
    first = estimates[0]
    for estimate in estimates[1:]:
        growth = {part: getattr(estimate, part) - getattr(first, part) for part in PARTS}
        for part in DURING_GENERATION:  # overlapping: only growth of the longest
            growth[part] = max(0.0, getattr(estimate, part) - first.generation)
        worst = max(growth, key=lambda part: growth[part])
        if growth[worst] > NOTICEABLE * first.step:
            return estimate.world_size, worst
    return None


def print_scale(run: PlannedRun, world_sizes: Sequence[int], console: Console) -> None:
    """Print tables for a batch that grows with the GPUs and for a constant one, the first limit, and the constants.

    The run's own number of GPUs does not matter.

    Raises:
        UserError: a number of GPUs is not a multiple of the first one, or does not fit the layout.
    """
    costs = Costs()
    growing, same = [], []
    for world_size in world_sizes:
        run = replace(run, world_size=world_size)
        if world_size % world_sizes[0] or layout_problems(run):
            raise UserError(
                f"--scale: {world_size} GPUs cannot be divided into this layout or into groups of {world_sizes[0]}; "
                "choose other numbers"
            )
        growing.append(estimate_step(with_batch_for(run, world_size // world_sizes[0]), costs))
        if run.has_work:
            same.append(estimate_step(run, costs))
    console.print(_table("the batch grows with the GPUs", growing))
    console.print(_table("the batch stays", same))
    limit = first_limit(growing)
    if limit:
        world_size, part = limit
        console.print(f"Breaks first as the batch grows: {PARTS[part]}, at {world_size:,} GPUs.", highlight=False)
    else:
        console.print("Nothing breaks up to here.")
    console.print(_constants_table(costs, run.assumptions))


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
    table = Table("constant", "value", Column("source", overflow="fold"), title="assumptions and their sources")
    table.add_row("mean response, tokens", f"{assumptions.mean_response_tokens:,}", "assumed")
    table.add_row("training", f"{assumptions.training_utilisation:.0%} of the peak", "assumed")
    table.add_row("decoding", f"{assumptions.bandwidth_utilisation:.0%} of the memory bandwidth", "assumed")
    for each in fields(costs):
        value = f"{getattr(costs, each.name):.3g} {each.metadata['unit']}".strip()
        table.add_row(each.name.replace("_", " "), value, each.metadata["source"])
    return table
