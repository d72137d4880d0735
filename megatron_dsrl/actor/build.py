"""Make an actor from a configuration and an HF model folder."""

from pathlib import Path

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.optimizer import build_optimizer, build_scheduler
from megatron_dsrl.actor.trainable_model import TrainableModel
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.build import DTYPES, build_model, build_trainable
from megatron_dsrl.weights.load import load_weights
from megatron_dsrl.weights.random_init import fill_with_random_weights
from megatron_dsrl.weights.tables import weight_table


def build_actor(config: RunConfig, folder: Path) -> Actor:
    """Build this rank's part of the policy, load or draw its weights, and make its optimizer.

    `initialize_parallel` must have run.

    Args:
        config: the run.
        folder: local folder of `config.model.path`, HF or Megatron distributed checkpoint.

    Raises:
        UserError: the folder's config.json or weights do not fit, or the model does not divide into the layout.
    """
    architecture = read_architecture(folder)
    table = weight_table(architecture)
    chunks = build_model(architecture, config.model, config.parallel)
    if config.model.random_init:
        fill_with_random_weights(chunks, table, architecture.initializer_range, config.seed)
    else:
        load_weights(chunks, table, folder)
    chunks = build_trainable(chunks, config.parallel)
    dtype = DTYPES[config.model.dtype]
    optimizer = build_optimizer(config.optimizer, chunks, dtype, config.parallel.distributed_optimizer)
    scheduler = build_scheduler(
        config.optimizer, optimizer, total_steps=config.steps * config.actor.optimizer_steps_per_rollout
    )
    return Actor(
        TrainableModel(chunks, optimizer, scheduler, config.actor.max_tokens_per_micro_batch),
        table=table,
        folder=folder,
        vocab_size=architecture.vocab_size,
        temperature=config.rollout.temperature,
    )
