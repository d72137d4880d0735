"""The stages, in the order in which they run: each relies on what the earlier ones have shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tools.gpu_record.architectures import TINY

SMALL, LARGE = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"
GPU_TESTS = ("tests/actor/test_gpu.py", "tests/rollout/test_gpu.py", "tests/platform/test_weight_digest.py")
FIRST_STEP_IS_PRERL = {"phases.0.until_step": "1"}
WHOLE_TRAINER_OFFLOADED = {f"actor.offload.{part}": "true" for part in ("gradients", "optimizer", "parameters")}
FRACTIONS = ("0.65", "0.75", "0.85")
"""Values of `engine.memory_fraction`; the stages before them use 0.4, and the shipped value of the 8B configuration."""


@dataclass(frozen=True)
class Training:
    """A `dsrl train` with random weights. Step 1 is NSR-PreRL, the others are GRPO."""

    model: str
    """`TINY`, or the published model that gives the architecture."""
    steps: int
    configuration: str
    """The configuration file that the stage's own settings override."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    own_batch: bool = False
    """Keep the configuration's batch and response length, instead of 32 prompts x 8 responses of up to 2,048 tokens."""


@dataclass(frozen=True)
class Stage:
    """One command, what it proves, what it needs."""

    name: str
    proves: str
    gpus: int
    """GPUs that it needs; 0: none."""
    limit_minutes: float
    """Time limit: several times what is expected."""
    arguments: tuple[str, ...] = ()
    """What Python is called with; empty for a training."""
    training: Training | None = None
    shown_lines: int = 0
    """Number of last lines of the output that belong in the record."""


METHOD = "configs/methods/dsrl.yaml"
ONE_GPU = {"engine.memory_fraction": "0.4", **WHOLE_TRAINER_OFFLOADED}
TWO_GPUS = {"engine.memory_fraction": "0.4", "actor.offload.gradients": "true"}

ENVIRONMENT = (
    Stage(
        "doctor", "packages, driver and kernels are there and fit together", 0, 10,
        arguments=("-m", "megatron_dsrl.cli", "doctor"), shown_lines=60,
    ),
    Stage(
        "gpu_tests", "kernels, offloading and weight push are right (tests marked `gpu`)", 1, 40,
        arguments=("-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", *GPU_TESTS), shown_lines=15,
    ),
)  # fmt: skip
RUNS = (
    Stage(
        "one_gpu_tiny", "engine and trainer share a GPU; every weight arrives in every step", 1, 20,
        training=Training(
            TINY, 4, METHOD, ONE_GPU | {"engine.memory_fraction": "0.2", "engine.check_weights": "always"}
        ),
    ),
    Stage(
        "one_gpu_0.6b", "Qwen3-0.6B trains in bfloat16; speeds, and memory beside the plan", 1, 40,
        training=Training(SMALL, 4, METHOD, ONE_GPU),
    ),
    Stage(
        "two_gpus_split", "NCCL: tensor and sequence parallelism, one engine per GPU", 2, 40,
        training=Training(SMALL, 3, METHOD, TWO_GPUS | {
            "parallel.tensor_parallel_size": "2", "parallel.sequence_parallel": "true",
        }),
    ),
    Stage(
        "two_gpus_replicated", "NCCL: data parallelism, distributed optimizer; an engine of two GPUs", 2, 40,
        training=Training(SMALL, 3, METHOD, TWO_GPUS | {
            "parallel.distributed_optimizer": "true", "engine.tensor_parallel_size": "2",
        }),
    ),
    Stage(
        "eight_gpus_8b", "two steps of the shipped 8B configuration at memory fraction 0.4", 8, 90,
        training=Training(
            LARGE, 2, "configs/dsrl_qwen3_8b.yaml", {"engine.memory_fraction": "0.4"}, own_batch=True
        ),
    ),
    Stage(
        "eight_gpus_8b_shipped", "the same at the memory fraction that is shipped", 8, 90,
        training=Training(LARGE, 2, "configs/dsrl_qwen3_8b.yaml", own_batch=True),
    ),
)  # fmt: skip
BENCHMARKS = tuple(
    Stage(
        f"benchmark_{name}", proves, 1, 30, arguments=(f"tools/benchmark_{name}.py", *arguments.split()), shown_lines=25
    )
    for name, proves, arguments in (
        ("log_probs", "time and memory of log-probs over the whole vocabulary", "--hidden-size 2048"),
        ("update", "what leaving out samples without a gradient saves",
         "--layers 8 --hidden-size 2048 --vocabulary 151936 --response-tokens 1024 --dtype bfloat16"),
        ("weight_sync", "GB/s of the weight push by bucket size, and through the disk",
         "--megabytes 1000 4000 --hidden-size 2048 --bucket-megabytes 64 256 1024"),
        ("checkpoint", "seconds of a checkpoint", "--megabytes 2000 --saves 2"),
    )
)  # fmt: skip
BENCHMARKS_ON_CPU = {
    "benchmark_log_probs": "--tokens 128 --vocabulary 2048 --repetitions 1",
    "benchmark_update": "--layers 1 --groups 2 --uniform-shares 0.5 --repetitions 1",
    "benchmark_weight_sync": "--megabytes 10 --bucket-megabytes 16 --rounds 1 --dtype float32",
    "benchmark_checkpoint": "--megabytes 10 --saves 1",
}
"""Arguments of the benchmarks in a dry run."""


def all_stages(gpus: int) -> tuple[Stage, ...]:
    """The stages for a machine with this many GPUs, with those that need more."""
    return (*ENVIRONMENT, *RUNS, *(_memory_stage(fraction, gpus) for fraction in FRACTIONS), *BENCHMARKS)


def _memory_stage(fraction: str, gpus: int) -> Stage:
    """The largest training that the machine can do, with more memory for the engine."""
    largest = next(stage for stage in (RUNS[-1], RUNS[1]) if stage.gpus <= max(gpus, 1))
    training = largest.training
    assert training is not None
    overrides = {**training.overrides, "engine.memory_fraction": fraction}
    name = "8B on eight GPUs" if training.model == LARGE else "0.6B on one GPU"
    return Stage(
        f"memory_{fraction}",
        f"engine.memory_fraction {fraction} fits ({name})",
        largest.gpus,
        largest.limit_minutes,
        training=Training(training.model, 2, training.configuration, overrides, training.own_batch),
    )
