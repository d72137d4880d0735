"""Memory of each part of a run on a GPU: the policy, the critic, the engine. fit.py combines them into peaks.

Weights, gradients and optimizer state are exact. Activations are the tensors that the layers keep for the backward
pass, within 2 % of measurements of the local layers (tests/planning/test_activations.py); temporary memory of single
operations is not included.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_dsrl.config.engine_numerics import FP8_BLOCK
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.parameters import (
    ProcessParameters,
    adapter_parameters_of_stage,
    parameters_of_critic_stage,
    parameters_of_model,
    parameters_of_projections,
    parameters_of_stage,
)

LOGITS_BLOCK_BYTES = 32 * 2**20
"""Size of an fp32 block of logits; there are two at a time (actor/log_probs.py)."""
GRADIENT_BYTES = 4
"""Gradients accumulate in fp32, regardless of the parameters' dtype."""


@dataclass(frozen=True)
class TrainerMemory:
    """Memory of a trained model, policy or critic, on one process. Unit: bytes."""

    weights: int
    trained: int
    """The weights that are trained, the only ones in checkpoints: with LoRA the adapters."""
    gradients: int
    optimizer: int
    activations: int
    """Activations kept for the backward passes of the micro-batches in flight."""
    recomputed: int
    """Activations that one layer recomputes in its backward pass, with `model.recompute`."""
    logits: int
    """Kept logits of a micro-batch and the blocks in work, or the critic's value head, plus the norm before them; last
    stage only."""

    @property
    def passing(self) -> int:
        """Peak of what exists only during an update. The logits are freed before the first layer is recomputed."""
        return self.activations + max(self.recomputed, self.logits)

    @property
    def resident(self) -> int:
        """Memory used throughout the step if nothing is offloaded."""
        return self.weights + self.gradients + self.optimizer

    def of_parts(self, parts: Collection[str]) -> int:
        """Memory of these parts, named as in `actor.offload`."""
        sizes = {"parameters": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        return sum(sizes[part] for part in parts)


@dataclass(frozen=True)
class EngineMemory:
    """An engine's memory on one GPU. Unit: bytes."""

    weights: int
    cache: int
    """Memory that `engine.memory_fraction` leaves for keys and values."""
    cache_tokens: int
    """Tokens that fit into the cache, over the GPUs of the engine."""
    bytes_per_token: int

    @property
    def used(self) -> int:
        """Weights, and the cache of `cache_tokens` tokens."""
        return self.weights + self.cache_tokens * self.bytes_per_token

    @property
    def total(self) -> int:
        """Weights and cache, as while sampling."""
        return self.weights + self.cache


def policy_memory(config: RunConfig, architecture: Architecture, world_size: int, stage: int) -> TrainerMemory:
    """The policy's memory on each process of a pipeline stage."""
    parameters = parameters_of_stage(architecture, config.parallel, stage)
    logits = _logits(config, architecture) if _is_last(config.parallel, stage) else 0
    if config.actor.lora is None:
        return _trainer_memory(config, architecture, world_size, stage, parameters, 0, logits)
    adapters = adapter_parameters_of_stage(architecture, config.parallel, stage, config.actor.lora)
    return _trainer_memory(config, architecture, world_size, stage, adapters, parameters.total, logits)


def critic_memory(config: RunConfig, architecture: Architecture, world_size: int, stage: int) -> TrainerMemory:
    """The critic's memory on each process of a pipeline stage. Its head takes the hidden states in fp32."""
    parameters = parameters_of_critic_stage(architecture, config.parallel, stage)
    head = 0
    if _is_last(config.parallel, stage):
        head = 2 * 4 * architecture.hidden_size * largest_row(config) + _final_norm(config, architecture)
    return _trainer_memory(config, architecture, world_size, stage, parameters, 0, head)


def _is_last(parallel: ParallelConfig, stage: int) -> bool:
    return stage == parallel.pipeline_parallel_size - 1


def _trainer_memory(
    config: RunConfig,
    architecture: Architecture,
    world_size: int,
    stage: int,
    trained: ProcessParameters,
    frozen: int,
    logits: int,
) -> TrainerMemory:
    """Memory of a model with this many parameters of both kinds. Adapters' own activations, of `rank` columns, are not
    counted; those of frozen layers are kept for the adapters beside them."""
    parallel = config.parallel
    element, replicas = element_bytes(config.model), optimizer_shards(parallel, world_size)
    expert_replicas = world_size // parallel.expert_model_parallel_size if parallel.distributed_optimizer else 1
    tokens, kept = largest_row(config), kept_bytes_per_token(architecture, config)
    layers = parallel.layers_of_stages(architecture.num_hidden_layers)[stage]
    return TrainerMemory(
        weights=(trained.total + frozen) * element,
        trained=trained.total * element,
        gradients=trained.total * GRADIENT_BYTES,
        optimizer=adam_bytes(config.model) * (trained.dense // replicas + trained.expert // expert_replicas),
        activations=int(tokens * micro_batches_in_flight(parallel, stage) * layers * kept),
        recomputed=int(tokens * (layer_bytes_per_token(architecture, config) - kept)),
        logits=logits,
    )


def optimizer_shards(parallel: ParallelConfig, world_size: int) -> int:
    """Processes that share the optimizer state of the same parameters, experts aside; 1 without the distributed
    optimizer."""
    shards = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    return shards if parallel.distributed_optimizer else 1


def engine_memory(config: RunConfig, architecture: Architecture, gpu_bytes: int) -> EngineMemory:
    """The engine's memory on each of its GPUs; SGLang applies the memory fraction to the GPU's whole memory."""
    size = config.engine.tensor_parallel_size
    element = element_bytes(config.model)
    weights = engine_weight_bytes(config, architecture) // size
    cache = max(0, int(config.engine.memory_fraction * gpu_bytes) - weights)
    per_token = cache_bytes_per_token(architecture, element, size)
    tokens = cache // per_token
    if config.engine.max_total_tokens is not None:
        tokens = min(tokens, config.engine.max_total_tokens)
    return EngineMemory(weights, cache, tokens, per_token)


def engine_weight_bytes(config: RunConfig, architecture: Architecture) -> int:
    """Size of all weights of an engine: with `engine.quantization`, a byte for each weight of a projection, and four
    for the scale of each block of them."""
    element, parameters = element_bytes(config.model), parameters_of_model(architecture)
    if config.engine.quantization is None:
        return parameters * element
    projections = parameters_of_projections(architecture)
    return (parameters - projections) * element + projections + 4 * projections // FP8_BLOCK**2


def largest_entry_bytes(config: RunConfig, architecture: Architecture) -> int:
    """Size of the largest whole Megatron parameter, which the weight push does not split (weights/stream.py)."""
    hidden, heads = architecture.hidden_size, architecture.num_attention_heads + 2 * architecture.num_key_value_heads
    inner = architecture.experts.moe_intermediate_size if architecture.experts else architecture.intermediate_size
    return element_bytes(config.model) * hidden * max(architecture.vocab_size, 2 * inner, heads * architecture.head_dim)


def cache_bytes_per_token(architecture: Architecture, element: int, engine_size: int) -> int:
    """Keys and values of one token on one GPU of an engine; heads that cannot be split further are replicated."""
    heads = max(1, architecture.num_key_value_heads // engine_size)
    return 2 * architecture.num_hidden_layers * heads * architecture.head_dim * element


def element_bytes(model: ModelConfig) -> int:
    """Bytes of a parameter or an activation."""
    return 2 if model.dtype == "bfloat16" else 4


def adam_bytes(model: ModelConfig) -> int:
    """Bytes per parameter of Adam's two moments, and of a master copy where parameters are bfloat16."""
    return 12 if model.dtype == "bfloat16" else 8


def largest_row(config: RunConfig) -> int:
    """Tokens of the largest packed row on one process: the token budget, or a longer single sequence."""
    tokens = max(config.actor.max_tokens_per_micro_batch, config.longest_sequence)
    return tokens // config.parallel.context_parallel_size


def layer_bytes_per_token(architecture: Architecture, config: RunConfig) -> float:
    """Bytes per token that a local layer keeps for the backward pass without recomputation.

    (Transformer Engine's fused layers keep less.)
    """
    parallel = config.parallel
    tensor, along_sequence = parallel.tensor_parallel_size, _split_along_sequence(config.parallel)
    head = architecture.head_dim
    queries, groups = architecture.num_attention_heads * head, architecture.num_key_value_heads * head
    # For each of the two norms: input, normalised input and output.
    hidden = 6 * architecture.hidden_size / along_sequence
    # Queries, keys and values as projected; queries and keys after their norms; and the output in the packed row.
    attention = (4 * queries + 3 * groups) / tensor + _core_attention(architecture, config.parallel)
    attention += 4 * head  # sine and cosine of the rotation, for queries and for keys
    if experts := architecture.experts:
        # For each of the token's experts: its input, gate, up and their activations; then the weighted sum. Processes
        # that split an expert have the same tokens.
        copies, inner_size = experts.num_experts_per_tok, experts.moe_intermediate_size
        inner = copies * (parallel.split_of_experts * architecture.hidden_size + 5 * inner_size) / tensor
        inner += architecture.hidden_size / along_sequence
    else:
        inner = 5 * architecture.intermediate_size / tensor
    return element_bytes(config.model) * (hidden + attention + inner)


def kept_bytes_per_token(architecture: Architecture, config: RunConfig) -> float:
    """Bytes per token that a local layer keeps between forward and backward pass, depending on `model.recompute`.

    `selective` saves only copies, since attention is fused. Transformer Engine makes no copies, so `selective` saves
    nothing there.
    """
    element, head = element_bytes(config.model), architecture.head_dim
    if config.model.recompute == "full":
        return element * architecture.hidden_size / _split_along_sequence(config.parallel)
    whole = layer_bytes_per_token(architecture, config)
    if config.model.recompute == "none":
        return whole
    rotated = (architecture.num_attention_heads + architecture.num_key_value_heads) * head
    given = rotated / config.parallel.tensor_parallel_size  # values are always kept as projected
    return whole - element * (_core_attention(architecture, config.parallel) - given)


def micro_batches_in_flight(parallel: ParallelConfig, stage: int) -> float:
    """Maximum number of micro-batches whose activations, for all layers of a stage, are kept at the same time.

    Under 1F1B (arXiv 2104.04473, section 2.2) it is the number of stages from this one to the last; the interleaved
    schedule works on chunks of a stage's layers, and starts with more of them.
    """
    stages, chunks = parallel.pipeline_parallel_size, parallel.virtual_pipeline_stages
    later = stages - stage - 1
    if chunks == 1:
        return later + 1
    return ((chunks - 1) * stages + 2 * later + 1) / chunks


def _core_attention(architecture: Architecture, parallel: ParallelConfig) -> float:
    """Elements per token that core attention keeps: its inputs and outputs, in padded batches. Under context
    parallelism its inputs are the keys and values of whole sequences."""
    heads = 2 * architecture.num_attention_heads
    heads += 2 * architecture.num_key_value_heads * parallel.context_parallel_size
    return heads * architecture.head_dim / parallel.tensor_parallel_size


def _split_along_sequence(parallel: ParallelConfig) -> int:
    return parallel.tensor_parallel_size if parallel.sequence_parallel else 1


def _final_norm(config: RunConfig, architecture: Architecture) -> int:
    """Memory of the final norm for a row: input, normalised input, output; and the output at scored tokens."""
    elements = 3 * architecture.hidden_size // _split_along_sequence(config.parallel) + architecture.hidden_size
    return largest_row(config) * elements * element_bytes(config.model)


def _logits(config: RunConfig, architecture: Architecture) -> int:
    """Memory of the logits if all tokens of the row are scored."""
    tensor, tokens, element = config.parallel.tensor_parallel_size, largest_row(config), element_bytes(config.model)
    width = architecture.padded_vocab_size(tensor) // tensor
    whole, block = tokens * width, tokens * min(width, max(1, LOGITS_BLOCK_BYTES // (4 * tokens)))
    kept = min(whole, config.actor.kept_logits_megabytes * 2**20 // (element * block) * block)
    computed_again = block if kept < whole else 0
    return element * (kept + computed_again) + 2 * 4 * block + _final_norm(config, architecture)
