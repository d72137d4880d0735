"""`dsrl fetch` and `push`: from the Hugging Face hub and to it. Heavy modules are only imported when one runs."""

import argparse
import sys

from megatron_dsrl.commands.arguments import Commands, add_command, names, read_config
from megatron_dsrl.run.loading import loading_megatron


def add_fetch(commands: Commands) -> None:
    parser = add_command(
        commands,
        "fetch",
        _fetch,
        "download what a run needs from the hub",
        description="Download a run's model, tokenizer and prompts, and benchmarks, in one process. Afterwards all "
        "ranks, and machines without a network that share the hub's cache (HF_HOME), read them from there.",
        epilog="example: dsrl fetch configs/dsrl_qwen3_8b.yaml --benchmarks math500,aime24",
    )
    parser.add_config()
    parser.add_argument(
        "--benchmarks", metavar="NAME,NAME", type=names, default=[], help="names or .yaml files, as for `dsrl eval`"
    )


def _fetch(options: argparse.Namespace) -> int:
    """Read everything that the run and the evaluation of its policy read, which downloads what is missing."""
    with loading_megatron(sys.stderr):
        from megatron_dsrl.config.benchmark import load_benchmark
        from megatron_dsrl.evaluation.evaluate import read_problems
        from megatron_dsrl.model.source import resolve_model_folder
        from megatron_dsrl.run.inputs import load_inputs

    config = read_config(options)
    benchmarks = [load_benchmark(name, data_folder=None) for name in options.benchmarks]
    inputs = load_inputs(config)
    for field, path in (("critic.path", config.critic.path), ("reference.path", config.reference.path)):
        if path is not None:
            resolve_model_folder(path, field)
    problems = read_problems(inputs.model_folder, benchmarks)
    sets = {"prompts": inputs.prompts} | {s.name: prompts for s, prompts in inputs.evaluation_sets} | problems
    print(f"model {inputs.model_folder}; {', '.join(f'{len(prompts)} {name}' for name, prompts in sets.items())}")
    return 0


def add_push(commands: Commands) -> None:
    parser = add_command(
        commands,
        "push",
        _push,
        "upload an exported policy with its model card to the Hugging Face hub",
        epilog="example: dsrl push runs/tiny_dsrl someone/tiny-dsrl --dry-run",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, one of its exports, or an HF folder with a README.md")
    parser.add_argument("repository", metavar="OWNER/NAME", help="model repository on the hub; created if necessary")
    parser.add_argument("--private", action="store_true", help="visible only to you, or to the organisation's members")
    parser.add_argument(
        "--base-model",
        metavar="OWNER/NAME",
        help="base model named on the card (default: model.path, if it comes from the hub)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="upload nothing; write the files and the model card to the folder `upload` within the policy's folder",
    )


def _push(options: argparse.Namespace) -> int:
    """Upload the newest policy that a run has exported, with a model card describing its method, data, configuration
    and evaluations. Needs a token with write access: HF_TOKEN, or `hf auth login`."""
    from megatron_dsrl.platform import silence_expected_warnings

    silence_expected_warnings()
    from megatron_dsrl.publishing.push import check_repository, describe_files, prepare_upload, push, write_upload

    check_repository(options.repository)
    upload = prepare_upload(options.run, options.base_model)
    if options.dry_run:
        print(f"would upload {describe_files(upload.files)} and the card of {upload.folder} to {options.repository}:")
        print(
            *(f"  {file.relative_to(upload.folder)}  {file.stat().st_size:,} bytes" for file in upload.files), sep="\n"
        )
        for name, text in sorted(upload.texts.items(), reverse=True):
            print(f"and this {name}:\n\n{text}")
        print(f"written to {write_upload(upload)}")
        return 0
    print(push(upload, options.repository, options.private, print))
    return 0
