"""`dsrl doctor`."""

import argparse

from megatron_dsrl.commands.arguments import Commands, add_command


def add_doctor(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        help="check the installation and say how to fix problems",
        description="List installed packages, devices and kernels, what is missing and how to fix it. Exit with status "
        "0  if a CPU or GPU run is possible, otherwise 1.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _doctor(options: argparse.Namespace) -> int:
    from megatron_dsrl.doctor.doctor import examine, print_as_json, print_for_people

    examination = examine()
    (print_as_json if options.json else print_for_people)(examination)
    return 0 if examination.can_run else 1
