"""The parts of the probe, the most valuable first; each is one process, and none relies on another."""

from dataclasses import dataclass

from tools.first_gpu_run.stages import GPU_TESTS


@dataclass(frozen=True)
class Part:
    """One process that measures something."""

    name: str
    measures: str
    limit_minutes: float
    arguments: tuple[str, ...]
    """What Python is called with on a GPU."""
    on_cpu: tuple[str, ...] = ()
    """Arguments added in a dry run."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""
    only_on_gpu: bool = False


TRAINER = ("-m", "tools.gpu_probe.trainer")
TRAINER_ON_CPU = (
    "--model", "tiny", "--dtype", "float32", "--groups", "2", "--response-tokens", "32",
    "--tokens-per-micro-batch", "512", "--bucket-megabytes", "1",
)  # fmt: skip
"""The later of two equal options counts."""
TRANSFORMER_ENGINE = "transformer_engine.pytorch"


def parts(folder: str) -> tuple[Part, ...]:
    """All parts.

    Args:
        folder: of the record, where a part may write.
    """
    return (
        Part("packages", "which kernels and engines can be imported", 10, ("-m", "tools.gpu_probe.packages")),
        Part(
            "device", "the device itself: products and copies", 3, ("-m", "tools.gpu_probe.device"),
            on_cpu=("--size", "256", "--megabytes", "16"),
        ),
        Part(
            "trainer_0.6b", "actor with Qwen3-0.6B, local layers, bfloat16", 5,
            (*TRAINER, "--model", "Qwen/Qwen3-0.6B"), on_cpu=TRAINER_ON_CPU,
        ),
        Part(
            "trainer_1.7b", "actor with Qwen3-1.7B, local layers, bfloat16", 6,
            (*TRAINER, "--model", "Qwen/Qwen3-1.7B", "--tokens-per-micro-batch", "8192"), on_cpu=TRAINER_ON_CPU,
        ),
        Part(
            "trainer_0.6b_transformer_engine", "actor with Qwen3-0.6B, Transformer Engine's layers", 5,
            (*TRAINER, "--model", "Qwen/Qwen3-0.6B", "--layer-spec", "transformer_engine"),
            needs=(TRANSFORMER_ENGINE,), only_on_gpu=True,
        ),
        Part(
            "actor_tests", "the actor's tests marked `gpu`", 10,
            ("-m", "pytest", "-m", "gpu", "-q", "-rs", "-p", "no:cacheprovider", GPU_TESTS[0]),
            needs=("pytest", "pytest_timeout", "transformers"),
        ),
        Part(
            "engine", "a few steps with an SGLang engine on the same device", 10,
            ("-m", "tools.first_gpu_run", "--only", "one_gpu_tiny", "--output", f"{folder}/engine"),
            on_cpu=("--dry-run",), needs=("sglang", "transformers", "aiohttp"),
        ),
    )  # fmt: skip
