"""Arguments of `dsrl push`. Light: what the command needs is imported when it runs."""

import argparse

from megatron_dsrl.commands.arguments import Commands, add_command


def add_push(commands: Commands) -> None:
    """Add the command to `dsrl`'s."""
    parser = add_command(
        commands,
        "push",
        _push,
        help="upload an exported policy with its model card to the Hugging Face hub",
        description="Upload the newest policy that a run has exported, with a model card of its method, data, "
        "configuration and evaluations. Needs a token that may write: HF_TOKEN, or `hf auth login`.",
        epilog="example: dsrl push runs/tiny_dsrl someone/tiny-dsrl --dry-run",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, one of its exports, or an HF folder with a README.md")
    parser.add_argument("repository", metavar="OWNER/NAME", help="of the model on the hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="only you, or the owner's members, can see it")
    parser.add_argument(
        "--base-model",
        metavar="OWNER/NAME",
        help="what the run began with, for the card (default: as model.path says, where that comes from the hub)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the files and the model card, and upload nothing"
    )


def _push(options: argparse.Namespace) -> int:
    from megatron_dsrl.platform import silence_expected_warnings

    silence_expected_warnings()
    from megatron_dsrl.publishing.push import check_repository, describe_files, prepare_upload, push

    check_repository(options.repository)
    upload = prepare_upload(options.run, options.base_model)
    if options.dry_run:
        print(f"would upload {describe_files(upload.files)} and the card of {upload.folder} to {options.repository}:")
        print(*(f"  {file.name}  {file.stat().st_size:,} bytes" for file in upload.files), sep="\n")
        print(f"and this README.md:\n\n{upload.card}", end="")
        return 0
    print(push(upload, options.repository, options.private, print))
    return 0
