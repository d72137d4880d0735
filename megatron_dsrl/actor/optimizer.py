"""Megatron's optimizer and learning-rate schedule, built from the configuration, and the changes a phase can make."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dsrl.config.actor import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, chunks: list[DistributedDataParallel], dtype: torch.dtype, distributed: bool
) -> MegatronOptimizer:
    """AdamW over the model chunks, with fp32 master weights for bf16 and clipping by the global norm.

    Adam's state is created at once, so that a checkpoint before the first step contains it. `distributed` shards it
    over data-parallel ranks.
    """
    optimizer = get_megatron_optimizer(
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
    for part in chained_optimizers(optimizer):
        part.init_state_fn(part.optimizer, part.config)
    own_step_counts(optimizer)
    return optimizer


def build_scheduler(config: OptimizerConfig, optimizer: MegatronOptimizer, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up to the peak, then constant or decaying to 0 after `total_steps` optimizer steps.

    Megatron's warm-up starts at `init_lr`, which is set above 0 so that the first step changes the weights.
    """
    return _OnePeakScheduler(
        optimizer,
        init_lr=_initial_rate(config.learning_rate, config.warmup_steps),
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


class _OnePeakScheduler(OptimizerParamScheduler):
    """Uses the scheduler's peak for every parameter group.

    Megatron prefers the peak stored in the group. It also uses that value to match groups in checkpoints, so it must
    stay what it was when the optimizer was built.
    """

    def get_lr(self, param_group: dict) -> float:
        return super().get_lr({**param_group, "max_lr": self.max_lr})


def apply_settings(
    optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, learning_rate: float, gradient_clip_norm: float
) -> None:
    """Change the peak learning rate and the clipping from the next step on; warm-up and decay continue where they are.
    A clipping norm of 0 means none."""
    scheduler.max_lr = learning_rate
    scheduler.init_lr = _initial_rate(learning_rate, scheduler.lr_warmup_steps)
    for part in chained_optimizers(optimizer):
        part.config.clip_grad = gradient_clip_norm
    scheduler.step(increment=0)


@torch.no_grad()
def forget_state(optimizer: MegatronOptimizer) -> None:
    """Reset Adam's moments and step counts to their initial values. Master weights stay."""
    for part in chained_optimizers(optimizer):
        for state in part.optimizer.state.values():
            for name in state.keys() & {"exp_avg", "exp_avg_sq", "step"}:
                state[name] = torch.zeros_like(state[name]) if isinstance(state[name], torch.Tensor) else 0
        for group in part.optimizer.param_groups:
            if "step" in group:  # fused implementations count per group
                group["step"] = torch.zeros_like(group["step"]) if isinstance(group["step"], torch.Tensor) else 0


def own_step_counts(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own step count in torch's AdamW, 0 if it has none.

    Megatron creates the moments without a count, and its loading shares one tensor between all parameters. AdamW
    increments in place, so each step would count once per parameter and the bias correction would be wrong.
    """
    for part in chained_optimizers(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                step = state.get("step", 0.0)
                state["step"] = torch.tensor(float(step), dtype=torch.float32)


def chained_optimizers(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    """The optimizers of dense and of expert parameters if Megatron chained them, else the only one."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _initial_rate(learning_rate: float, warmup_steps: int) -> float:
    return learning_rate / (warmup_steps + 1) if warmup_steps else 0.0
