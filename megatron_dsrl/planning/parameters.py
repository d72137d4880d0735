"""Numbers of parameters per process, exactly as Megatron builds the model."""

from dataclasses import dataclass, replace

from megatron_dsrl.config.actor import LoraConfig
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.model.projections import projections


@dataclass(frozen=True)
class ProcessParameters:
    """Parameters of one process; experts are counted separately because they have their own data parallelism."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def parameters_of_stage(architecture: Architecture, parallel: ParallelConfig, stage: int) -> ProcessParameters:
    """Parameters of each process of a pipeline stage (counted from 0).

    A tied head on another stage than the embedding is a copy, and counts.
    """
    tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    layers = parallel.layers_of_stages(architecture.num_hidden_layers)[stage]
    vocabulary = architecture.padded_vocab_size(tensor) // tensor * architecture.hidden_size
    dense = layers * _dense_per_layer(architecture, tensor)
    if stage == 0:
        dense += vocabulary
    if stage == stages - 1:
        dense += architecture.hidden_size  # final norm
        if not architecture.tie_word_embeddings or stages > 1:
            dense += vocabulary
    expert = 0
    if architecture.experts:
        expert = layers * architecture.experts.num_experts // parallel.expert_parallel_size
        expert *= 3 * architecture.hidden_size * architecture.experts.moe_intermediate_size // parallel.split_of_experts
    return ProcessParameters(dense, expert)


def adapter_parameters_of_stage(
    architecture: Architecture, parallel: ParallelConfig, stage: int, lora: LoraConfig
) -> ProcessParameters:
    """Parameters of the LoRA adapters on each process of a pipeline stage: of each pair of matrices one is split."""
    tensor, per_layer = parallel.tensor_parallel_size, 0
    for each in projections(architecture, lora.target_modules):
        split, whole = (each.in_size, each.out_size) if each.is_row_parallel else (each.out_size, each.in_size)
        per_layer += lora.rank * (split // tensor + whole)
    return ProcessParameters(parallel.layers_of_stages(architecture.num_hidden_layers)[stage] * per_layer, expert=0)


def parameters_of_critic_stage(architecture: Architecture, parallel: ParallelConfig, stage: int) -> ProcessParameters:
    """Parameters of each process of a pipeline stage of the critic: the policy's, but a head of hidden -> 1 with bias.

    Every tensor-parallel process has the whole head.
    """
    tensor, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    policy = parameters_of_stage(replace(architecture, tie_word_embeddings=False), parallel, stage)
    if stage < stages - 1:
        return policy
    vocabulary = architecture.padded_vocab_size(tensor) // tensor * architecture.hidden_size
    return replace(policy, dense=policy.dense - vocabulary + architecture.hidden_size + 1)


def parameters_of_model(architecture: Architecture) -> int:
    """Parameters of the whole model; a tied head counts once."""
    return parameters_of_stage(architecture, ParallelConfig(), 0).total


def parameters_of_projections(architecture: Architecture) -> int:
    """Weights of attention's and feed-forward layers' matrices in the whole model, all experts among them; without
    embedding, head and routers."""
    if experts := architecture.experts:
        inner = experts.num_experts * experts.moe_intermediate_size
    else:
        inner = architecture.intermediate_size
    per_layer = _attention_matrices(architecture) + 3 * architecture.hidden_size * inner
    return architecture.num_hidden_layers * per_layer


def active_per_token(architecture: Architecture) -> int:
    """Parameters of the layers' matrix products that one token passes through; without embedding and head."""
    per_layer = _attention_matrices(architecture)
    if experts := architecture.experts:
        per_layer += experts.num_experts * architecture.hidden_size  # router
        per_layer += experts.num_experts_per_tok * 3 * architecture.hidden_size * experts.moe_intermediate_size
    else:
        per_layer += 3 * architecture.hidden_size * architecture.intermediate_size
    return architecture.num_hidden_layers * per_layer


def _dense_per_layer(architecture: Architecture, tensor: int) -> int:
    hidden, head = architecture.hidden_size, architecture.head_dim
    queries_keys_values = (architecture.num_attention_heads + 2 * architecture.num_key_value_heads) * head
    count = _attention_matrices(architecture) // tensor + 2 * hidden  # and two norms
    if architecture.family.qkv_bias:
        count += queries_keys_values // tensor
    if architecture.family.qk_layernorm:
        count += 2 * head
    if architecture.experts:
        return count + architecture.experts.num_experts * hidden
    return count + 3 * hidden * architecture.intermediate_size // tensor


def _attention_matrices(architecture: Architecture) -> int:
    heads = 2 * architecture.num_attention_heads + 2 * architecture.num_key_value_heads
    return heads * architecture.head_dim * architecture.hidden_size
