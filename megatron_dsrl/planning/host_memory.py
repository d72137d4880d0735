"""Memory of a run on its host, besides the programs themselves."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dsrl.algorithms.schedule import passes_of_run
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.memory import TrainerMemory, element_bytes, optimizer_shards


@dataclass(frozen=True)
class HostMemory:
    """Memory of a process, by pipeline stage. Unit: bytes."""

    reference: tuple[int, ...]
    """The reference policy's weights, with LoRA its adapters, in page-locked memory; 0 without one."""
    offloaded: tuple[int, ...]
    """Copies of the offloaded parts. Gradients are dropped, not copied."""
    checkpoint: tuple[int, ...]
    """Upper bound of the weights and optimizer state that a process copies for an asynchronous checkpoint. (With data
    parallelism it is less, since replicas share the writing.)"""
    gathered: tuple[int, ...]
    """Upper bound of what a process gathers for a checkpoint from the other shards of the distributed optimizer,
    synchronous or not; 0 without other shards."""
    routed_experts: int
    """With `rollout.routing_replay`: upper bound of the experts of a step's tokens, which every process has."""

    @property
    def total(self) -> int:
        """Memory of the process that needs the most."""
        by_stage = zip(self.reference, self.offloaded, self.checkpoint, self.gathered)
        return max(map(sum, by_stage)) + self.routed_experts

    @property
    def pinned(self) -> int:
        """The part of it that is page-locked on GPUs, where PyTorch rounds every block up to a power of two."""
        return max(map(sum, zip(self.reference, self.offloaded)))


def host_memory(
    config: RunConfig, architecture: Architecture, world_size: int, stages: Sequence[tuple[TrainerMemory, ...]]
) -> HostMemory:
    """Memory of each process; `stages` has the models on each pipeline stage, the policy first."""
    needs_reference = passes_of_run(config.phases, config.steps).reference_log_probs
    policies = [models[0] for models in stages]
    reference = [policy.trained if config.reference.path is None else policy.weights for policy in policies]
    kept = [part for part in config.actor.offload.parts if part != "gradients"]
    copied = stages if config.checkpoint.asynchronous else [()] * len(stages)
    return HostMemory(
        reference=tuple(weights if needs_reference else 0 for weights in reference),
        offloaded=tuple(sum(memory.of_parts(kept) for memory in models) for models in stages),
        checkpoint=tuple(sum(memory.trained + memory.optimizer for memory in models) for models in copied),
        gathered=tuple(sum(_gathered(memory, config, world_size) for memory in models) for models in stages),
        routed_experts=_routed_experts(config, architecture),
    )


def _gathered(memory: TrainerMemory, config: RunConfig, world_size: int) -> int:
    """Memory of Megatron's `get_parameter_state_dp_zero`: float32 weights and both moments of all trained parameters,
    this process's shard of them, and one of the three twice while it is received."""
    shards, parameters = optimizer_shards(config.parallel, world_size), memory.trained // element_bytes(config.model)
    return 4 * parameters * (3 + 2) + 12 * parameters // shards if shards > 1 else 0


def _routed_experts(config: RunConfig, architecture: Architecture) -> int:
    """Size of a step's routing records at full length: a byte per token, layer and choice, in base64
    (model/routed_experts.py)."""
    if not (config.rollout.routing_replay and architecture.experts):
        return 0
    tokens = config.rollout.samples_per_step * config.longest_sequence
    return tokens * architecture.num_hidden_layers * architecture.experts.num_experts_per_tok * 4 // 3
