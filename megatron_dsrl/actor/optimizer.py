"""Megatron's optimizer and learning-rate schedule from the configuration."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dsrl.config.actor import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, chunks: list[DistributedDataParallel], dtype: torch.dtype, distributed: bool
) -> MegatronOptimizer:
    """AdamW over the model chunks: fp32 master weights where they train in bf16, clipping by the global norm.

    Args:
        config: hyper-parameters.
        chunks: this pipeline stage's model chunks, wrapped for data parallelism.
        dtype: parameter dtype.
        distributed: shard the optimizer state over data parallelism.
    """
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            min_lr=0.0,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.gradient_clip_norm,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        ),
        chunks,
    )


def build_scheduler(config: OptimizerConfig, optimizer: MegatronOptimizer, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up to the peak, then constant or decaying to 0 after `total_steps` optimizer steps.

    Megatron's warm-up starts at `init_lr`; it is set so that the first step already moves.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.learning_rate / (config.warmup_steps + 1) if config.warmup_steps else 0.0,
        max_lr=config.learning_rate,
        min_lr=0.0,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps, config.warmup_steps + 1),
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
