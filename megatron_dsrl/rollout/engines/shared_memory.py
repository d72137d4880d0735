"""Whether /dev/shm is large enough for the weight push of a CPU run, which goes through it."""

import shutil
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.planning.parameters import parameters_of_model

FOLDER = Path("/dev/shm")
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2}


def check_shared_memory(config: RolloutSettings, ranks: int) -> None:
    """Compare the free space with what the buckets of all ranks take at a time: each fills one while an engine copies
    another.

    Args:
        config: the model and the size of a bucket.
        ranks: processes of this machine that push weights.

    Raises:
        UserError: the folder has less free space than that.
    """
    architecture = read_architecture(resolve_model_folder(config.model.path))
    size = BYTES_PER_PARAMETER[config.model.dtype]
    largest_tensor = size * architecture.vocab_size * architecture.hidden_size
    largest_bucket = max(config.engine.weight_bucket_megabytes * 2**20, largest_tensor)
    needed = min(size * parameters_of_model(architecture), 2 * largest_bucket)
    free = shutil.disk_usage(FOLDER).free
    if free < ranks * needed:
        raise UserError(
            f"engine.weight_bucket_megabytes: on a CPU, weights go to the engines through {FOLDER}, in two buckets at "
            f"a time, {needed / 2**20:.1f} MiB for each of {ranks} process(es), but {free / 2**20:.1f} MiB are free; "
            "lower the bucket size, remove old files there, or enlarge it (docker run --shm-size=16g)"
        )
