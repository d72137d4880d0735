"""`dsrl convert`. torch is only imported when the command runs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dsrl.commands.arguments import Command, Commands, add_command, positive, positive_number
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.run.loading import loading_megatron

if TYPE_CHECKING:
    import torch

    from megatron_dsrl.conversion.convert import ConversionOptions
    from megatron_dsrl.evaluation.find_model import EvaluatedModel

DTYPES = ("float32", "bfloat16", "float16")


def add_convert(commands: Commands) -> None:
    group = commands.add_parser(
        "convert",
        help="convert checkpoints between HF and Megatron, or compare two",
        description="Convert between HF folders and Megatron distributed checkpoints (torch_dist), or compare two.",
    )
    directions = group.subcommands("directions", "DIRECTION")
    _add_hf_to_megatron(directions)
    _add_megatron_to_hf(directions)
    _add_verify(directions)


def _add_hf_to_megatron(directions: Commands) -> None:
    parser = add_command(
        directions, "hf-to-megatron", _hf_to_megatron, "HF folder or hub name to Megatron distributed checkpoint"
    )
    parser.add_argument("source", metavar="SOURCE", help="HF folder or hub name, such as Qwen/Qwen3-8B")
    parser.add_argument("target", metavar="TARGET", type=Path, help="output folder")
    for option, what in (
        ("--tensor-parallel-size", "tensor-parallel size"),
        ("--pipeline-parallel-size", "pipeline stages"),
        ("--virtual-pipeline-parallel-size", "virtual stages per pipeline stage"),
        ("--expert-parallel-size", "expert-parallel size"),
    ):
        parser.add_argument(option, metavar="N", type=positive, default=1, help=f"{what} of the target (default: 1)")
    parser.add_argument(
        "--expert-tensor-parallel-size",
        metavar="N",
        type=positive,
        help="tensor-parallel size of experts (default: same as --tensor-parallel-size)",
    )
    _add_common(parser)


def _add_megatron_to_hf(directions: Commands) -> None:
    parser = add_command(directions, "megatron-to-hf", _megatron_to_hf, "Megatron distributed checkpoint to HF folder")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="checkpoint folder, such as RUN/checkpoints/step_...; a run folder means its newest checkpoint",
    )
    parser.add_argument("target", metavar="TARGET", type=Path, help="output folder")
    parser.add_argument(
        "--file-gigabytes",
        metavar="GB",
        type=positive_number,
        default=5.0,
        help="size limit of a weight file (default: 5)",
    )
    _add_model(parser, "SOURCE")
    _add_common(parser)


def _add_model(parser: Command, checkpoint: str) -> None:
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help=f"HF folder or hub name to take config.json and tokenizer from (default: {checkpoint} itself; "
        "for a run's checkpoint, the model that the run trains)",
    )


def _add_common(parser: Command) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: same as the source)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the result back before it appears at TARGET, and compare every tensor with the source, and the "
        "logits of both models if they fit in memory",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing TARGET at the very end, if it is empty or contains nothing but a model",
    )
    parser.add_argument(
        "--expect",
        metavar="PATH",
        type=Path,
        help="HF folder or run YAML that SOURCE must match: sizes, RoPE base, norm epsilon, tied embeddings",
    )
    parser.add_processes()


def _add_verify(directions: Commands) -> None:
    parser = add_command(directions, "verify", _verify, "compare an HF folder and a Megatron checkpoint")
    parser.add_argument("hf", metavar="HF", type=Path, help="HF folder")
    parser.add_argument("megatron", metavar="MEGATRON", type=Path, help="checkpoint folder or run folder")
    _add_model(parser, "MEGATRON")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype that the weights were converted to (default: unchanged)")
    parser.add_processes()


def _hf_to_megatron(options: argparse.Namespace) -> int:
    """Convert an HF model to a Megatron distributed checkpoint. Any layout can load it; the sizes below only set how it
    is split into chunks."""
    with loading_megatron(what="PyTorch"):
        from megatron_dsrl.conversion.convert import convert_hf_to_megatron
        from megatron_dsrl.conversion.distributed_checkpoint_writer import CheckpointLayout
        from megatron_dsrl.conversion.work import conversion_processes

    layout = CheckpointLayout(
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        virtual_pipeline_parallel_size=options.virtual_pipeline_parallel_size,
        expert_parallel_size=options.expert_parallel_size,
        expert_tensor_parallel_size=options.expert_tensor_parallel_size,
    )
    with conversion_processes():
        convert_hf_to_megatron(options.source, options.target, layout, _conversion_options(options))
    say_on_first_rank(f"written to {options.target}")
    return 0


def _megatron_to_hf(options: argparse.Namespace) -> int:
    """Convert a Megatron distributed checkpoint of any layout to an HF folder."""
    with loading_megatron(what="PyTorch"):
        from megatron_dsrl.common.collective import rank
        from megatron_dsrl.conversion.convert import convert_megatron_to_hf
        from megatron_dsrl.conversion.work import conversion_processes
        from megatron_dsrl.publishing.card import write_card

    file_bytes = int(options.file_gigabytes * 1e9)
    with conversion_processes():
        source = _find_checkpoint(options.source, options.model)
        convert_megatron_to_hf(
            source.folder, options.target, file_bytes, _conversion_options(options), source.companions
        )
        if source.run_folder is not None and source.step is not None and rank() == 0:
            write_card(options.target, source.run_folder, source.step, print)
    say_on_first_rank(f"written to {options.target}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Compare every tensor of an HF folder and a Megatron checkpoint made from it, and the logits of both models if
    they fit in memory. If they differ, print the names and exit with status 2."""
    with loading_megatron(what="PyTorch"):
        from megatron_dsrl.conversion.verify import verify
        from megatron_dsrl.conversion.work import conversion_processes

    with conversion_processes():
        found = _find_checkpoint(options.megatron, options.model)
        verify(options.hf, found.folder, source="hf", dtype=_dtype(options.dtype), companions=found.companions)
    return 0


def _find_checkpoint(folder: Path, model: str | None) -> "EvaluatedModel":
    from megatron_dsrl.common.collective import on_first
    from megatron_dsrl.evaluation.find_model import find_checkpoint
    from megatron_dsrl.model.source import resolve_model_folder

    return on_first(lambda: find_checkpoint(folder, resolve_model_folder(model, "--model") if model else None))


def _conversion_options(options: argparse.Namespace) -> "ConversionOptions":
    from megatron_dsrl.conversion.convert import ConversionOptions

    return ConversionOptions(
        dtype=_dtype(options.dtype), verify=options.verify, overwrite=options.overwrite, expect=options.expect
    )


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    return getattr(torch, name) if name else None
