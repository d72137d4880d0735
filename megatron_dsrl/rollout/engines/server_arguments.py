"""SGLang's arguments for the engines that a run starts."""

from pathlib import Path

from megatron_dsrl.common.cpu_threads import cpu_threads
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import find_config_json
from megatron_dsrl.planning.parameters import parameters_of_model
from megatron_dsrl.platform.engine import ServerArguments, engine_server_arguments
from megatron_dsrl.rollout.engines.tensor_layout import fp8_server_arguments

DISK_WEIGHT_VERSION = 0
"""Version of the weights that an engine loads from the model folder; the first push makes it 1."""

UNSET_WEIGHT_VERSION = -1
"""Version of an engine that started with dummy weights because the model folder has none that SGLang can load."""


def server_arguments(config: RolloutSettings, engine: int) -> ServerArguments:
    """SGLang's `ServerArgs` fields for this engine. Raises UserError if settings contradict each other."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if config.engine.max_context_tokens is not None and config.engine.max_context_tokens < longest:
        raise UserError(
            f"engine.max_context_tokens = {config.engine.max_context_tokens} is less than data.max_prompt_tokens + "
            f"rollout.max_response_tokens = {longest}"
        )
    arguments: ServerArguments = {
        "model_path": config.model.path,
        "dtype": config.model.dtype,
        "tp_size": config.engine.tensor_parallel_size,
        "random_seed": config.seed + engine,
        "load_format": "auto" if starts_with_weights(config) else "dummy",
        "weight_version": str(initial_weight_version(config)),
        # Token ids go in and come out: the engine needs neither tokenizer nor detokenizer.
        "skip_tokenizer_init": True,
        "stream_interval": 1000,  # nothing is streamed
        "log_level": "warning",
        **engine_server_arguments(config.engine, config.rollout.deterministic),
    }
    if config.engine.quantization:
        arguments |= fp8_server_arguments()
    if config.rollout.routing_replay:
        arguments["enable_return_routed_experts"] = True
    if config.engine.max_context_tokens is not None:
        arguments["context_length"] = config.engine.max_context_tokens
    if config.engine.max_total_tokens is not None:
        arguments["max_total_tokens"] = config.engine.max_total_tokens
    return arguments | config.engine.extra_arguments


def engine_threads(config: RolloutSettings) -> int:
    """Threads of each of an engine's processes on a CPU."""
    parameters = parameters_of_model(read_architecture(find_config_json(config.model.path).parent))
    return cpu_threads(parameters, engine=config.engine.cpu_threads).engine


def initial_weight_version(config: RolloutSettings) -> int:
    """Weight version of an engine before the first push."""
    return DISK_WEIGHT_VERSION if starts_with_weights(config) else UNSET_WEIGHT_VERSION


def starts_with_weights(config: RolloutSettings) -> bool:
    """Whether SGLang can load weights from the model folder: not from a Megatron checkpoint, nor with random_init, nor
    if it stores them in another form."""
    folder = Path(config.model.path)
    if config.engine.quantization:
        return False
    return not config.model.random_init and (not folder.is_dir() or any(folder.glob("*.safetensors")))
