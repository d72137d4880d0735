"""Which layouts fit: the rules for processes, model sizes and engines.

Pure functions that yield what is wrong; `derive` lists it with a run's other problems, `refuse` raises it alone.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.numbers import counted
from megatron_dsrl.config.model import ParallelConfig

Problem = tuple[str, str]
"""The field or fields at fault, and what is wrong and what to do."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer that the layout depends on."""

    layers: int
    attention_heads: int
    """Query heads."""
    key_value_groups: int
    """Key/value heads; as many as `attention_heads` without GQA."""
    feed_forward_size: int
    """Inner size of the MLP; unused with experts."""
    context_tokens: int
    """Longest sequence that the positions support."""
    yarn_context_tokens: int = 0
    """Longest sequence that its YaRN scaling supports; 0 without YaRN."""
    experts: int = 0
    """Experts of every layer; 0 for a dense model."""
    expert_feed_forward_size: int = 0
    """Inner size of one expert."""
    key_value_size: int = 0
    """Width of all key heads together; that of all value heads is the same."""


def refuse(problems: Iterable[Problem]) -> None:
    """Raise UserError with one line per problem, if there are any."""
    lines = [f"{fields}: {what}" for fields, what in problems]
    if lines:
        raise UserError("\n".join(lines))


def process_problems(parallel: ParallelConfig, world_size: int) -> Iterator[Problem]:
    """The processes must divide into whole copies of the model, and of the experts."""
    if world_size % parallel.model_parallel_size:
        yield (
            "parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size",
            f"one model takes {parallel.tensor_parallel_size} x {parallel.pipeline_parallel_size} x "
            f"{parallel.context_parallel_size} = {parallel.model_parallel_size} processes, and "
            f"{counted(world_size, 'process')} cannot be divided by that; change the sizes or the number of processes "
            "(--processes)",
        )
    elif world_size % parallel.expert_model_parallel_size:
        yield (
            "parallel.expert_parallel_size, parallel.expert_tensor_parallel_size, parallel.pipeline_parallel_size",
            f"all experts together take {parallel.expert_parallel_size} x {parallel.split_of_experts} x "
            f"{parallel.pipeline_parallel_size} = {parallel.expert_model_parallel_size} processes, and "
            f"{counted(world_size, 'process')} cannot be divided by that; change the sizes or the number of processes",
        )
    if parallel.sequence_parallel and parallel.tensor_parallel_size == 1:
        yield (
            "parallel.sequence_parallel",
            "needs parallel.tensor_parallel_size above 1, over which it splits; set it to false",
        )
    if parallel.virtual_pipeline_stages > 1 and parallel.pipeline_parallel_size == 1:
        yield (
            "parallel.virtual_pipeline_stages",
            "needs parallel.pipeline_parallel_size of at least 2, since it cuts pipeline stages; set it to 1",
        )
    if parallel.pipeline_parallel_size == 1:
        for field in ("layers_in_first_stage", "layers_in_last_stage"):
            if getattr(parallel, field) is not None:
                yield f"parallel.{field}", "needs parallel.pipeline_parallel_size of at least 2; set it to null"


def model_problems(parallel: ParallelConfig, shape: ModelShape) -> Iterator[Problem]:
    """The model must divide into the layout. The vocabulary is padded and always fits."""
    tensor = parallel.tensor_parallel_size
    divided = [("attention heads", shape.attention_heads), ("key/value heads", shape.key_value_groups)]
    if not shape.experts:
        divided.append(("feed-forward channels", shape.feed_forward_size))
    for what, size in divided:
        if size % tensor:
            yield "parallel.tensor_parallel_size", indivisible(what, size, tensor)
    yield from _pipeline_problems(parallel, shape)
    yield from _expert_problems(parallel, shape)


def _pipeline_problems(parallel: ParallelConfig, shape: ModelShape) -> Iterator[Problem]:
    pipeline, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_stages
    given = [parallel.layers_in_first_stage, parallel.layers_in_last_stage]
    stages = parallel.layers_of_stages(shape.layers)
    if sum(stages) != shape.layers or min(stages) < 1:
        if given == [None, None]:
            yield (
                "parallel.pipeline_parallel_size",
                indivisible("layers", shape.layers, pipeline)
                + ", or set parallel.layers_in_first_stage, parallel.layers_in_last_stage or both",
            )
            return
        counts = [count for count in given if count is not None]
        between, left = pipeline - len(counts), shape.layers - sum(counts)
        yield (
            "parallel.layers_in_first_stage, parallel.layers_in_last_stage",
            f"leave {left} of the model's {shape.layers} layers for {counted(between, 'other pipeline stage')}, which "
            "cannot share them evenly; choose other numbers"
            if between
            else f"add up to {sum(counts)} layers, but the model has {shape.layers}",
        )
    elif wrong := [count for count in stages if count % virtual]:
        yield (
            "parallel.pipeline_parallel_size, parallel.virtual_pipeline_stages",
            f"{pipeline} x {virtual} = {pipeline * virtual} virtual stages: the {wrong[0]} layers of a pipeline stage "
            f"cannot be split {virtual} ways; choose a divisor of {wrong[0]}",
        )


def _expert_problems(parallel: ParallelConfig, shape: ModelShape) -> Iterator[Problem]:
    expert, split = parallel.expert_parallel_size, parallel.split_of_experts
    if not shape.experts:
        if expert > 1:
            yield "parallel.expert_parallel_size", f"is {expert}, but the model has no experts; set it to 1"
        return
    if shape.experts % expert:
        yield "parallel.expert_parallel_size", indivisible("experts", shape.experts, expert)
    if shape.expert_feed_forward_size % split:
        yield (
            "parallel.expert_tensor_parallel_size",
            indivisible("channels of an expert", shape.expert_feed_forward_size, split),
        )
    if parallel.tensor_parallel_size > 1 and not parallel.sequence_parallel:
        yield (
            "parallel.sequence_parallel",
            "must be true if a model with experts is split over parallel.tensor_parallel_size: Megatron routes "
            "every token on one process only",
        )


def engine_problems(tensor_parallel_size: int, world_size: int, shape: ModelShape | None = None) -> Iterator[Problem]:
    """The processes must divide into engines, and the model into an engine's."""
    field, size = "engine.tensor_parallel_size", tensor_parallel_size
    if world_size % size:
        yield (
            field,
            f"{counted(world_size, 'process')} cannot be divided into engines of {size}; "
            "choose a divisor of the number of processes",
        )
    if shape is None:
        return
    if shape.attention_heads % size:
        yield field, indivisible("attention heads", shape.attention_heads, size)
    # With more processes than key/value heads SGLang copies each head a whole number of times.
    if shape.key_value_groups % size and size % shape.key_value_groups:
        yield field, indivisible("key/value heads", shape.key_value_groups, size)


def indivisible(what: str, size: int, parts: int) -> str:
    """A message that a model size is not divisible, with the divisors that would work."""
    return f"the model's {size} {what} cannot be split {parts} ways; choose a divisor of {size}"
