"""`dsrl doctor`."""

import argparse

from megatron_dsrl.commands.arguments import Commands, add_command


def add_doctor(commands: Commands) -> None:
    """Add the command to `dsrl`\'s."""
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        help="say what is installed, what is missing, and what to do about it",
        description="Say what is installed, which devices and kernels there are, what is missing, and what to do. Exit "
        "status 0 when a CPU or a GPU run is possible, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _doctor(options: argparse.Namespace) -> int:
    from megatron_dsrl.doctor.doctor import examine, print_as_json, print_for_people

    examination = examine()
    (print_as_json if options.json else print_for_people)(examination)
    return 0 if examination.can_run else 1
