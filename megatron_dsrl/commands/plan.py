"""`dsrl plan`. Heavy modules are only imported when the command runs."""

import argparse

from megatron_dsrl.commands.arguments import Command, Commands, add_command, positive, positive_number, read_config


def add_plan(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plan",
        _plan,
        "predict memory and time of a run, and list the layouts that fit",
        epilog="example: dsrl plan configs/dsrl_qwen3_8b.yaml --gpu h100 --gpus 8",
    )
    parser.add_config()
    parser.add_argument("--gpus", metavar="N", type=positive, default=8, help="number of GPUs (default: 8)")
    _add_gpu(parser)
    parser.add_argument(
        "--mean-response-tokens",
        metavar="N",
        type=positive,
        help="assumed mean length of a response (default: half its limit)",
    )
    parser.add_argument(
        "--training-utilisation",
        metavar="SHARE",
        type=_share,
        default=0.35,
        help="share of peak FLOP/s (default: 0.35)",
    )
    parser.add_argument(
        "--scale",
        metavar="N,N,...",
        type=_growing,
        help="instead, model a step on these numbers of GPUs, such as 8,64,512,4096, and say what breaks first",
    )


def _add_gpu(parser: Command) -> None:
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        default="h100",
        help="a100, h100, h20, b200, rtx-4090, mi300x... (default: h100; a wrong name lists them all)",
    )
    for option, metavar, what in (
        ("--gpu-memory", "GIB", "memory a process can allocate"),
        ("--gpu-tflops", "N", "dense bfloat16 peak, in 1e12 operations per second"),
        ("--gpu-bandwidth", "TB/S", "memory bandwidth, in 1e12 bytes per second"),
    ):
        parser.add_argument(option, metavar=metavar, type=positive_number, help=f"{what} (default: built-in value)")


def _plan(options: argparse.Namespace) -> int:
    """Predict the memory of every GPU in an update, a weight push and generation, the operations and seconds of a step,
    and the largest lengths that fit, and list layouts that fit. Exits with status 0 if the run fits, otherwise 1. Needs
    no GPU, and no network for Qwen3's published sizes."""
    from rich.console import Console

    from megatron_dsrl.config.summary import batch_lines
    from megatron_dsrl.model.architecture import read_architecture
    from megatron_dsrl.model.source import find_config_json
    from megatron_dsrl.planning import layouts, tables
    from megatron_dsrl.planning.gpus import find_gpu
    from megatron_dsrl.planning.plan import make_plan
    from megatron_dsrl.planning.planned_run import Assumptions, PlannedRun
    from megatron_dsrl.planning.scale import print_scale
    from megatron_dsrl.run.preflight import preflight

    config, gpus, console = read_config(options), options.gpus, Console()
    gpu = find_gpu(options.gpu, options.gpu_memory, options.gpu_tflops, options.gpu_bandwidth)
    architecture = read_architecture(find_config_json(config.model.path, config.made_by).parent)
    mean_response_tokens = options.mean_response_tokens or config.rollout.max_response_tokens // 2
    assumptions = Assumptions(mean_response_tokens, options.training_utilisation)
    run = PlannedRun(config, architecture, gpu, gpus, assumptions)
    if options.scale:
        print_scale(run, options.scale, console)
        return 0
    fits = False
    if problems := layouts.layout_problems(run):
        tables.print_impossible_layout(problems, gpus, console)
    else:
        console.print(*batch_lines(config, preflight(config, gpus)), sep="\n", highlight=False)
        plan = make_plan(run)
        tables.print_plan(plan, console)
        fits = plan.fits
    suggestions = layouts.suggest(run, count=5)
    needed = None if suggestions else layouts.fewest_gpus(run)
    tables.print_suggestions(run, suggestions, needed, console)
    return 0 if fits else 1


def _growing(text: str) -> list[int]:
    values = [positive(word) for word in text.split(",")]
    if values != sorted(set(values)):
        raise argparse.ArgumentTypeError(f"expected increasing numbers such as 8,64,512, got {text}")
    return values


def _share(text: str) -> float:
    value = positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, got {text}")
    return value
