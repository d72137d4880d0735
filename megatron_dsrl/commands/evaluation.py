"""`dsrl eval`, `table` and `rescore`. torch is only imported when a command runs."""

import argparse
from pathlib import Path

from megatron_dsrl.commands.arguments import Commands, add_command, labelled_folders, names
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import launched_rank
from megatron_dsrl.run.loading import loading_megatron

CHANGES = {
    "samples_per_prompt": ("--samples", "K", int, "responses per problem (default: the benchmark's)"),
    "temperature": ("--temperature", "T", float, "0 is greedy (default: the benchmark's)"),
    "top_p": ("--top-p", "P", float, "nucleus sampling (default: the benchmark's)"),
    "max_response_tokens": ("--max-tokens", "N", int, "response length limit (default: the benchmark's)"),
    "limit": ("--limit", "N", int, "only the first N problems of each benchmark"),
}
"""Benchmark fields that options override, and those options."""


def add_eval(commands: Commands) -> None:
    parser = add_command(
        commands,
        "eval",
        _eval,
        "evaluate a model on benchmarks",
        epilog="example: dsrl eval Qwen/Qwen3-4B --benchmarks math500,aime24 --samples 32",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="HF folder, hub name, Megatron checkpoint, run folder (its newest policy) or checkpoint of a run",
    )
    parser.add_overrides(
        "override `seed` or a field of `model`, `engine` or `rollout`, such as engine.tensor_parallel_size=2"
    )
    parser.add_argument(
        "--benchmarks", metavar="NAME,NAME", type=names, help="names (omit to list them) or .yaml files"
    )
    for field, (option, metavar, kind, what) in CHANGES.items():
        parser.add_argument(option, dest=field, metavar=metavar, type=kind, help=what)
    parser.add_argument(
        "--data-folder", metavar="DIR", type=Path, help="folder with the benchmarks' files (default: use the hub)"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="output folder (default: RUN/evaluation/step_... for a run, else evaluations/<model>)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check names and settings, list the benchmarks, and stop"
    )
    parser.add_processes()


def _eval(options: argparse.Namespace) -> int:
    """Sample a model on benchmarks with the same engines as training, score the samples, and write results.json,
    results.md and pass_at_k.svg. Every sample is saved as soon as it is finished, and the same command resumes an
    interrupted evaluation."""
    from megatron_dsrl.config.benchmark import benchmark_names

    if not options.benchmarks:
        raise UserError(f"--benchmarks: name some of {', '.join(benchmark_names())}")
    with loading_megatron():
        from megatron_dsrl.evaluation.evaluate import EvaluationRequest, evaluate, requested_benchmarks
        from megatron_dsrl.publishing.card import refresh_card

    request = EvaluationRequest(
        model=options.model,
        benchmarks=options.benchmarks,
        output=options.output,
        data_folder=options.data_folder,
        changes={field: value for field in CHANGES if (value := getattr(options, field)) is not None},
        overrides=options.overrides,
    )
    if options.dry_run:
        for benchmark in requested_benchmarks(request):
            config = benchmark.config
            print(f"{benchmark.name}: {config.samples_per_prompt} samples per problem of {config.source}")
        return 0
    model = evaluate(request)
    if launched_rank() == 0 and model.run_folder is not None and model.step is not None:
        refresh_card(model.run_folder, model.step, print)
    return 0


def add_rescore(commands: Commands) -> None:
    parser = add_command(
        commands,
        "rescore",
        _rescore,
        "score the samples of an evaluation again with another verifier",
        epilog="example: dsrl rescore evaluations/Qwen3-4B --verifier hendrycks --output evaluations/hendrycks",
    )
    parser.add_argument("evaluation", metavar="DIR", type=Path, help="output folder of dsrl eval")
    parser.add_argument("--verifier", metavar="NAME", required=True, help="built-in, or package.module:function")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the second evaluation")


def _rescore(options: argparse.Namespace) -> int:
    """Score the samples that `dsrl eval` saved with another verifier, without sampling again, and write the results as
    a second evaluation. `hendrycks` scores as the paper's released code does."""
    from megatron_dsrl.config.data import RewardConfig
    from megatron_dsrl.evaluation.rescore import rescore
    from megatron_dsrl.evaluation.results import markdown, read_results
    from megatron_dsrl.rewards.registry import Fields, check_options

    check_options(options.verifier, {}, Fields("--verifier", "--verifier"))
    summaries = rescore(options.evaluation, options.output, RewardConfig(function=options.verifier))
    print(markdown(read_results(options.evaluation).model, summaries))
    print(f"written to {options.output}")
    return 0


def add_table(commands: Commands) -> None:
    parser = add_command(
        commands,
        "table",
        _table,
        "print the paper's results table, filled with your evaluations",
        epilog="example: dsrl table base=evaluations/Qwen3-4B GRPO=runs/grpo1,runs/grpo2 DSRL=runs/dsrl1,runs/dsrl2",
    )
    parser.add_argument(
        "evaluations",
        metavar="METHOD=DIR,DIR",
        nargs="*",
        help="a method and its evaluations: run folders (latest policy) or output folders of dsrl eval",
    )
    parser.add_argument("--size", metavar="NAME", default="Qwen3-4B", help="Qwen3-4B (default) or Qwen3-8B")
    parser.add_argument("--output", metavar="FILE", type=Path, help="also write the table to this file")


def _table(options: argparse.Namespace) -> int:
    """Print the paper's results table in Markdown, with results of `dsrl eval` beside the published ones; cells without
    a measurement stay empty. Use these names for the paper's methods: base, GRPO, PPO, REINFORCE++, RLOO, Dr.GRPO,
    DAPO, NSR-RL warm-up and DSRL."""
    from megatron_dsrl.common.disk import write_result
    from megatron_dsrl.evaluation.paper_table import paper_table
    from megatron_dsrl.evaluation.results import newest_results

    for text in options.evaluations:
        if "=" not in text:
            raise UserError(f"`{text}`: expected METHOD=DIR,DIR")
    by_method = labelled_folders(options.evaluations)
    evaluations = {method: [newest_results(folder) for folder in folders] for method, folders in by_method.items()}
    table = paper_table(evaluations, options.size)
    if options.output:
        write_result(options.output, table)
    print(table, end="")
    return 0
