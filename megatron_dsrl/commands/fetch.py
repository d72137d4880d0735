"""`dsrl fetch`."""

import argparse
import sys

from megatron_dsrl.commands.arguments import Commands, add_command, add_config
from megatron_dsrl.run.loading import loading_megatron


def add_fetch(commands: Commands) -> None:
    parser = add_command(
        commands,
        "fetch",
        _fetch,
        help="download what a run needs from the hub",
        description="Download a run's model, tokenizer and prompts, and benchmarks, in one process. Afterwards all "
        "ranks, and machines without a network that share the hub's cache (HF_HOME), read them from there.",
        epilog="example: dsrl fetch configs/dsrl_qwen3_8b.yaml --benchmarks math500,aime24",
    )
    add_config(parser)
    parser.add_argument(
        "--benchmarks",
        metavar="NAME,NAME",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        default=[],
        help="names or .yaml files, as for `dsrl eval`",
    )


def _fetch(options: argparse.Namespace) -> int:
    from megatron_dsrl.config.load import load_config

    with loading_megatron(sys.stderr):
        from megatron_dsrl.run.fetch import fetch

    print(fetch(load_config(options.config, options.overrides), options.benchmarks))
    return 0
