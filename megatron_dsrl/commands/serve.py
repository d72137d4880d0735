"""`dsrl serve`."""

import argparse

from megatron_dsrl.commands.arguments import Commands, add_command, add_config, port


def add_serve(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        _serve,
        help="start an SGLang server for a run with engine.urls",
        description="Start an SGLang server for a run that names it in engine.urls, with the settings of the run's "
        "engine section, and keep it running until it is stopped (Ctrl-C). Callers need the key in the environment "
        "variable DSRL_ENGINE_API_KEY, if it is set.",
        epilog="example: dsrl serve examples/asynchronous/run.yaml --port 30000",
    )
    add_config(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port, default=30000, help="port to listen on (default: %(default)s)")


def _serve(options: argparse.Namespace) -> int:
    from megatron_dsrl.config.load import load_config
    from megatron_dsrl.run.serving import serve

    serve(load_config(options.config, options.overrides), options.host, options.port)
    return 0
