"""Floating-point operations of a step, and an estimate of its seconds.

Operations counted: two per parameter and token in a matrix product, twice that for the backward pass, causal attention,
the passes that a phase makes before its update (old log-probs, reference, values), and the critic's update. With LoRA
the policy's backward pass computes no gradients of frozen weights; the adapters' own products are not counted. Every
sample is assumed to be kept. Seconds depend on two assumptions, which are arguments: the share of the peak that
training reaches (MFU), and the share of the memory bandwidth that decoding reaches. Verification is not included.
"""

from megatron_dsrl.algorithms.schedule import required_passes
from megatron_dsrl.config.model import Recompute
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.memory import EngineMemory, cache_bytes_per_token, element_bytes
from megatron_dsrl.planning.parameters import active_per_token
from megatron_dsrl.planning.planned_run import PlannedRun


def forward_flops(architecture: Architecture, context: int, scored: int) -> float:
    """Operations of one sequence through the policy, forward only: `context` tokens, then `scored` ones, for which
    alone the output layer computes."""
    return _layer_flops(architecture, context + scored) + _head_flops(architecture, scored)


def training_flops(architecture: Architecture, context: int, scored: int, recompute: Recompute) -> float:
    """The same forward and backward; `recompute` is the part of the forward pass that is repeated."""
    return _layer_training_flops(architecture, context + scored, recompute) + 3 * _head_flops(architecture, scored)


def phase_flops(run: PlannedRun, phase: PhaseConfig) -> float:
    """Operations of one step of a phase over all GPUs: passes and updates of policy and critic."""
    config, architecture, scored = run.config, run.architecture, run.assumptions.mean_response_tokens
    recompute = config.model.recompute
    total = 0.0
    for objective in phase.objectives.values():
        needed = required_passes(objective)
        context = objective.space.max_context_tokens(config.data.max_prompt_tokens)
        off_policy = config.actor.optimizer_steps_per_rollout > 1
        forwards = int(needed.old_log_probs or off_policy) + int(needed.reference_log_probs)
        total += forwards * forward_flops(architecture, context, scored)
        update = training_flops(architecture, context, scored, recompute)
        if config.actor.lora:
            frozen = 2 * active_per_token(architecture) * (context + scored)
            update -= frozen + _head_flops(architecture, scored)
        total += update * config.actor.epochs_per_rollout
        if needed.values:  # one forward pass and the critic's update; its head is negligible
            tokens = context + scored
            total += _layer_flops(architecture, tokens)
            total += _layer_training_flops(architecture, tokens, recompute) * config.critic.epochs_per_rollout
    return total * config.rollout.samples_per_step


def _layer_flops(architecture: Architecture, tokens: int) -> float:
    return 2 * active_per_token(architecture) * tokens + _core_attention_flops(architecture, tokens)


def _layer_training_flops(architecture: Architecture, tokens: int, recompute: Recompute) -> float:
    once = _layer_flops(architecture, tokens)
    again = {"none": 0, "selective": _core_attention_flops(architecture, tokens), "full": once}
    return 3 * once + again[recompute]


def _core_attention_flops(architecture: Architecture, tokens: int) -> float:
    heads = architecture.num_attention_heads * architecture.head_dim
    return 2 * architecture.num_hidden_layers * heads * tokens * tokens  # 4 h t^2, and half of it under causality


def _head_flops(architecture: Architecture, scored: int) -> float:
    return 2 * architecture.hidden_size * architecture.vocab_size * scored


def training_seconds(run: PlannedRun, flops: float) -> float:
    """Seconds of one step's update: operations over all GPUs, plus the idle part of the pipeline."""
    config, assumptions, parallel = run.config, run.assumptions, run.config.parallel
    stages = parallel.pipeline_parallel_size
    tokens = config.rollout.samples_per_step * (config.data.max_prompt_tokens + assumptions.mean_response_tokens)
    replicas = max(1, run.world_size // parallel.model_parallel_size)
    micro_batches = max(1.0, tokens / replicas / config.actor.max_tokens_per_micro_batch)
    bubble = (stages - 1) / (micro_batches * parallel.virtual_pipeline_stages)
    return (1 + bubble) * flops / (run.world_size * run.gpu.flops * assumptions.training_utilisation)


def generation_seconds(run: PlannedRun, engine: EngineMemory) -> float:
    """Seconds of one rollout batch: every decoding step reads the weights and the cache of the running samples.

    External servers (`engine.urls`) are assumed to have GPUs of the same kind. Samples that do not fit into the cache
    wait. Not included: the tail, when the last samples run alone.
    """
    config, architecture, assumptions = run.config, run.architecture, run.assumptions
    size = config.engine.tensor_parallel_size
    engines = len(config.engine.urls) or max(1, run.world_size // size)
    samples = config.rollout.samples_per_step / engines
    mean_context = config.data.max_prompt_tokens + assumptions.mean_response_tokens / 2
    running = max(1.0, min(samples, engine.cache_tokens / mean_context))
    element = element_bytes(config.model)
    cache = running * mean_context * cache_bytes_per_token(architecture, element, size)
    reading = (engine.weights + cache) / (run.gpu.bytes_per_second * assumptions.bandwidth_utilisation)
    per_token = 2 * active_per_token(architecture) + _head_flops(architecture, scored=1)
    computing = per_token * running / size / (run.gpu.flops * assumptions.training_utilisation)
    return max(reading, computing) * assumptions.mean_response_tokens * samples / running
