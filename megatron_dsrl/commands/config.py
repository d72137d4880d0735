"""`dsrl config`. Heavy modules are imported when it runs."""

import argparse

from megatron_dsrl.commands.arguments import Commands, add_command

KIND_NAMES = ("run", "sweep", "benchmark", "eval", "gradients")


def add_config_command(commands: Commands) -> None:
    parser = add_command(
        commands,
        "config",
        _config,
        help="explain fields of the configuration: types, defaults, choices",
        description="Explain a field or a section of the configuration: type, default, limits, choices and meaning. "
        "Without a key, show the top level.",
        epilog="example: dsrl config rollout.top_p; dsrl config phases.loss; dsrl config phases.loss.gspo",
    )
    parser.add_argument("key", metavar="KEY", nargs="?", help="dotted path; you may leave out positions in lists")
    parser.add_argument(
        "--kind",
        choices=KIND_NAMES,
        default="run",
        help="what is configured: a run (default), a sweep, a benchmark, or the overrides of `dsrl eval` or "
        "`dsrl analyse gradients`",
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema, for editors")


def _config(options: argparse.Namespace) -> int:
    from megatron_dsrl.config.kinds import KINDS

    kind = KINDS[options.kind]
    if options.schema:
        from megatron_dsrl.config.json_schema import as_text

        print(as_text(kind.schema()), end="")
        return 0
    from rich.console import Console

    from megatron_dsrl.config.describe import Place, find
    from megatron_dsrl.config.show import show

    console = Console(highlight=False, emoji=False)
    if not options.key:
        show(Place("", kind.section), console)
        console.print(f"\nThis is {kind.where}. `dsrl config KEY` explains a key.")
        return 0
    for number, place in enumerate(find(kind.section, options.key)):
        if number:
            console.print()
        show(place, console)
    return 0
