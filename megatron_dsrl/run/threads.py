"""The threads of the trainer on a CPU, and what the terminal says about them."""

from pathlib import Path

import torch

from megatron_dsrl.common.cpu_threads import cpu_threads, has_bfloat16
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.planning.parameters import parameters_of_model
from megatron_dsrl.platform import current_platform


def use_cpu_threads(config: RunConfig, folder: Path) -> list[str]:
    """Set the number of this process's threads. Does nothing on a GPU.

    Args:
        folder: local folder of `config.model.path`.

    Returns:
        Lines for the terminal; none on a GPU.
    """
    if current_platform().name != "cpu":
        return []
    parameters = parameters_of_model(read_architecture(folder))
    threads = cpu_threads(parameters, config.actor.cpu_threads, config.engine.cpu_threads)
    torch.set_num_threads(threads.trainer)
    lines = [f"threads: {threads} (actor.cpu_threads, engine.cpu_threads)"]
    if config.model.dtype == "bfloat16" and not has_bfloat16():
        lines.append("warning: this CPU has no bfloat16 instructions; model.dtype=float32 is faster here")
    return lines
