"""Build an actor or a critic from a configuration and a model folder."""

from pathlib import Path

from megatron.core.transformer.module import MegatronModule

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.critic import Critic
from megatron_dsrl.actor.optimizer import build_optimizer, build_scheduler
from megatron_dsrl.actor.sharded_model import TrainableModel
from megatron_dsrl.config.actor import OptimizerConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import CRITIC_MAY_DIFFER, check_same_architecture, read_architecture
from megatron_dsrl.model.build import DTYPES, build_model, build_trainable, build_value_model
from megatron_dsrl.model.lora import add_adapters
from megatron_dsrl.model.source import is_hub_name, resolve_model_folder
from megatron_dsrl.weights.load import fill_with_random_weights, load_value_model, load_weights
from megatron_dsrl.weights.peft import PeftAdapters, adapter_table
from megatron_dsrl.weights.table import WeightTable, value_model_table, weight_table


def build_actor(config: RunConfig, folder: Path) -> Actor:
    """Build this rank's part of the policy, load or draw its weights, and create its optimizer.

    `initialize_parallel` must have run. The folder is that of `config.model.path`: HF or Megatron distributed
    checkpoint. Raises UserError if the folder's config.json or weights do not match, or the layout does not divide the
    model.
    """
    architecture = read_architecture(folder)
    table = weight_table(architecture)
    chunks = build_model(architecture, config.model, config.parallel)
    if config.model.random_init:
        fill_with_random_weights(chunks, table, architecture.initializer_range, config.seed)
    else:
        load_weights(chunks, table, folder)
    adapters = None
    if config.actor.lora:
        # What PEFT loads adapters on: the hub name where `model.path` is one, otherwise the folder.
        base_model = config.model.path if is_hub_name(config.model.path) else str(folder.resolve())
        adapters = PeftAdapters(config.actor.lora, adapter_table(architecture, config.actor.lora), base_model)
        add_adapters(chunks, architecture, config.actor.lora)
        fill_with_random_weights(chunks, adapters.table, architecture.initializer_range, config.seed)
    learning_steps = config.steps - config.critic.warmup_steps
    total_steps = learning_steps * config.actor.optimizer_steps_per_rollout
    return Actor(
        _trainable(config, chunks, table, config.optimizer, total_steps),
        folder=folder,
        vocab_size=architecture.vocab_size,
        temperature=config.rollout.temperature,
        router=config.model.router,
        kept_logits_bytes=config.actor.kept_logits_megabytes * 2**20,
        adapters=adapters,
    )


def build_critic(config: RunConfig, folder: Path, steps: int) -> Critic:
    """Build this rank's part of the critic, with the policy's architecture and layout, and its optimizer.

    `initialize_parallel` must have run. Raises UserError if the weights do not match the architecture, or the layout
    does not divide the model.

    Args:
        folder: that of `config.model.path`; its config.json gives the architecture. The weights come from
            `config.critic.path` if set, else from this folder; they are random under `model.random_init`.
        steps: number of steps of the run in which the critic is trained.
    """
    architecture, critic = read_architecture(folder), config.critic
    table = value_model_table(architecture)
    chunks = build_value_model(architecture, config.model, config.parallel)
    if config.model.random_init and critic.path is None:
        fill_with_random_weights(chunks, table, architecture.initializer_range, config.seed)
    else:
        source, stored = folder, architecture
        if critic.path is not None:
            source = resolve_model_folder(critic.path, field="critic.path")
            stored = check_same_architecture("critic.path", source, architecture, CRITIC_MAY_DIFFER)
        load_value_model(chunks, stored, source)
    total_steps = steps * critic.optimizer_steps_per_rollout
    return Critic(_trainable(config, chunks, table, critic.optimizer, total_steps), critic)


def _trainable(
    config: RunConfig,
    chunks: list[MegatronModule],
    table: WeightTable,
    optimizer_config: OptimizerConfig,
    total_steps: int,
) -> TrainableModel:
    """Wrap chunks with loaded weights for training and add an optimizer."""
    wrapped = build_trainable(chunks, config.parallel)
    dtype = DTYPES[config.model.dtype]
    optimizer = build_optimizer(optimizer_config, wrapped, dtype, config.parallel.distributed_optimizer)
    scheduler = build_scheduler(optimizer_config, optimizer, total_steps)
    return TrainableModel(
        wrapped,
        table,
        optimizer,
        scheduler,
        config.actor.max_tokens_per_micro_batch,
        config.checkpoint.gather_optimizer_on,
    )
