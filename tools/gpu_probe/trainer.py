"""The actor alone, with random weights: update, log-probs, offloading, weight stream."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.actor.offload import MODEL_PARTS
from megatron_dsrl.algorithms.advantages import GroupStandardised
from megatron_dsrl.algorithms.experience import Experience, Response, build_experience
from megatron_dsrl.algorithms.objective import build_objectives
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.config.actor import ActorConfig
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.config.model import ModelConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.model.build import DTYPES
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.planning.compute import forward_flops, training_flops
from megatron_dsrl.planning.fit import RESERVE_BYTES, run_memory
from megatron_dsrl.platform import current_platform, silence_expected_warnings
from megatron_dsrl.platform.weight_digest import weight_digest
from tools.gpu_probe.clock import seconds_of
from tools.gpu_probe.reports import Figures, measure_each, report_figures
from tools.gpu_probe.weight_stream import measure_weight_stream
from tools.gpu_record.architectures import TINY, write_architecture
from tools.gpu_record.machine import this_gpu
from tools.gpu_record.planned import GIB, planned_trainer_bytes, utilisation

GRPO = PhaseConfig(name="GRPO", space=PostTrain(), advantage=GroupStandardised())
GROUP_SIZE = 8
PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Work:
    """What is measured."""

    actor: Actor
    config: RunConfig
    architecture: Architecture
    experience: Experience
    response_tokens: int
    repetitions: int

    @property
    def samples(self) -> int:
        """Number of responses."""
        return len(self.experience)

    @property
    def tokens(self) -> int:
        """Tokens of all samples, prompts included."""
        return self.samples * (PROMPT_TOKENS + self.response_tokens)


def main() -> int:
    """Measure, and report; returns the exit status."""
    options = parse_options()
    silence_expected_warnings()
    with tempfile.TemporaryDirectory(prefix="gpu-probe-") as name:
        folder = Path(name)
        write_architecture(folder, options.model)
        architecture = read_architecture(folder)
        config = fitting_config(folder, options, architecture, current_platform().memory_bytes)
        experience = build_experience(_random_responses(architecture, options), GRPO.space)
        with parallel_layout(config.parallel, seed=1):
            actor = build_actor(config, folder)
            report_figures({f"trainer, {name}": used for name, used in actor.model.implementations.items()})
            if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
                report_figures({"trainer, torch.compile": "off: no C compiler, or no Python headers"})
            work = Work(actor, config, architecture, experience, options.response_tokens, options.repetitions)
            measurements: dict[str, Callable[[], Figures]] = {
                "update": partial(measure_update, work),
                "log-probs": partial(measure_log_probs, work),
                "offloading": partial(measure_offloading, work),
                "weight stream": partial(measure_weight_stream, actor, options.bucket_megabytes * 2**20),
            }
            status = measure_each(measurements)
        destroy_parallel()
    return status


def fitting_config(folder: Path, options: argparse.Namespace, architecture: Architecture, capacity: int) -> RunConfig:
    """The configuration with the wanted micro-batches or, if these do not fit according to the plan, smaller ones.

    Args:
        capacity: memory of the device in bytes.
    """
    tokens = options.tokens_per_micro_batch
    while True:
        config = _config(folder, options, tokens)
        peak = planned_trainer_bytes(run_memory(config, architecture, capacity, 1)) + RESERVE_BYTES
        if peak <= capacity or tokens // 2 < PROMPT_TOKENS + options.response_tokens:
            return config
        tokens //= 2


def _config(folder: Path, options: argparse.Namespace, tokens_per_micro_batch: int) -> RunConfig:
    """The configuration of the run that the actor belongs to, which the plan is made for."""
    return RunConfig(
        name="probe",
        steps=100,
        model=ModelConfig(
            path=str(folder), dtype=options.dtype, random_init=True, layer_spec=options.layer_spec, recompute="none"
        ),
        actor=ActorConfig(max_tokens_per_micro_batch=tokens_per_micro_batch),
        data=DataConfig(source="unused", max_prompt_tokens=PROMPT_TOKENS),
        rollout=RolloutConfig(
            prompts_per_step=options.groups,
            samples_per_prompt=GROUP_SIZE,
            max_response_tokens=options.response_tokens,
        ),
        phases=[GRPO],
    )


def measure_update(work: Work) -> Figures:
    """Speed and peak memory of an optimizer step, after a first one."""
    objectives = build_objectives(GRPO, [work.experience], max_response_tokens=work.response_tokens)
    current_platform().restart_peak_memory()
    first = seconds_of(lambda: work.actor.update(objectives))
    seconds = min(seconds_of(lambda: work.actor.update(objectives)) for _ in range(work.repetitions))
    peak = current_platform().memory_statistics().recent_peak_bytes
    flops = training_flops(work.architecture, PROMPT_TOKENS, work.response_tokens, "none") * work.samples / seconds
    planned = planned_trainer_bytes(run_memory(work.config, work.architecture, current_platform().memory_bytes, 1))
    return {
        "update, tokens/s": f"{work.tokens / seconds:,.0f}",
        "update, tokens per micro-batch": f"{work.config.actor.max_tokens_per_micro_batch:,}",
        "update, MFU": utilisation(flops, this_gpu()),
        "update, s": f"{seconds:.3g} for {work.tokens:,} tokens; the first {first:.3g}",
        "update, peak memory, GiB": f"{peak / GIB:.2f}",
        "update, planned peak, GiB": f"{planned / GIB:.2f}",
    }


def measure_log_probs(work: Work) -> Figures:
    """Speed of a pass that only scores."""
    seconds = min(seconds_of(lambda: work.actor.log_probs(work.experience)) for _ in range(work.repetitions))
    flops = forward_flops(work.architecture, PROMPT_TOKENS, work.response_tokens) * work.samples / seconds
    return {
        "log-prob pass, tokens/s": f"{work.tokens / seconds:,.0f}",
        "log-prob pass, share of the peak": utilisation(flops, this_gpu()),
    }


def measure_offloading(work: Work) -> Figures:
    """Rates of moving all parts to the host and back; the first move to the host also allocates there.

    Raises:
        RuntimeError: the weights are not what they were before.
    """
    before = _digests(work.actor)
    figures: Figures = {}
    for turn in ("first", "next"):
        moved: list[int] = []
        seconds = seconds_of(lambda: moved.append(work.actor.model.memory.offload(MODEL_PARTS)))
        copied = moved[0] - _gradient_bytes(work.actor)
        figures[f"offload, {turn}, GB/s"] = f"{copied / seconds / 1e9:.3g} ({copied / 1e9:.3g} GB)"
        seconds = seconds_of(lambda: work.actor.model.memory.onload(MODEL_PARTS))
        figures[f"onload, {turn}, GB/s"] = f"{copied / seconds / 1e9:.3g}"
    if _digests(work.actor) != before:
        raise RuntimeError("the weights have changed on the way to the host and back")
    return figures


def _gradient_bytes(actor: Actor) -> int:
    """Gradients are dropped, not copied; they are float32."""
    return sum(4 * parameter.numel() for chunk in actor.model.chunks for parameter in chunk.parameters())


def _digests(actor: Actor) -> list[str]:
    # Of copies: on CPU a digest makes the memory that it reads impossible to free.
    return [
        weight_digest(parameter.detach().clone()) for chunk in actor.model.chunks for parameter in chunk.parameters()
    ]


def _random_responses(architecture: Architecture, options: argparse.Namespace) -> list[Response]:
    """Groups of 8, half of each right, so that every sample has a gradient."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(architecture.vocab_size, (length,), generator=generator).tolist()

    prompts = [tokens(PROMPT_TOKENS) for _ in range(options.groups)]
    length = options.response_tokens
    return [
        Response(prompts[group], tokens(length), [-5.0] * length, float(sample % 2), group)
        for group in range(options.groups)
        for sample in range(GROUP_SIZE)
    ]


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=TINY, help="`tiny`, or a published model such as Qwen/Qwen3-0.6B")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layer-spec", choices=("local", "transformer_engine"), default="local")
    parser.add_argument("--groups", type=int, default=4, help=f"of {GROUP_SIZE} samples (default: 4)")
    parser.add_argument("--response-tokens", type=int, default=2048)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=16_384)
    parser.add_argument("--bucket-megabytes", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
