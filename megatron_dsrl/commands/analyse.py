"""`dsrl analyse`. torch is only imported when the command runs."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_dsrl.commands.arguments import Command, Commands, add_command, labelled_folders, positive
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.run.loading import loading_megatron


def add_analyse(commands: Commands) -> None:
    group = commands.add_parser(
        "analyse",
        help="analyse recorded rollouts or evaluations: gradients, thoughts, problems, lengths, behaviours, Pass@K",
        description="Each analysis writes KIND.jsonl, KIND.json and KIND.svg into RUN/analysis and prints its summary; "
        "pass-at-k, which compares several runs, writes pass_at_k.svg, .md and .jsonl into --output.",
    )
    kinds = group.subcommands("analyses", "KIND")
    _add_gradients(kinds)
    _add_kind(kinds, "thoughts", _thoughts, "reflection and transition thoughts per response, counted with word lists")
    _add_kind(kinds, "problems", _problems, "problems solved, unsolved, newly solved, and solved at least once")
    _add_kind(kinds, "lengths", _lengths, "response length and entropy over training")
    _add_behaviours(kinds)
    _add_pass_at_k(kinds)


def _add_kind(kinds: Commands, name: str, command: Callable[[argparse.Namespace], int], what: str) -> Command:
    """Add an analysis with the arguments that all of them share."""
    parser = add_command(kinds, name, command, what, description=what[0].upper() + what[1:] + ".")
    accepted = "run folder" if name in ("problems", "lengths") else "run folder, or a sample file of dsrl eval"
    parser.add_argument("source", metavar="RUN", type=Path, help=accepted)
    default = "the first one" if name == "gradients" else "all"
    parser.add_argument("--steps", metavar="N,N", type=_numbers, help=f"recorded steps to analyse (default: {default})")
    parser.add_argument("--output", metavar="DIR", type=Path, help="output folder (default: RUN/analysis)")
    return parser


def _add_gradients(kinds: Commands) -> None:
    parser = _add_kind(
        kinds,
        "gradients",
        _gradients,
        "inner product and cosine of the gradients of log P(y) and log P(y|x), and the log-prob gap",
    )
    parser.epilog = "split the model: dsrl analyse gradients RUN --processes 2 parallel.tensor_parallel_size=2"
    parser.add_overrides("set a field of the sections `model` and `parallel`, or `temperature` or `bos`")
    parser.add_processes()
    parser.add_argument(
        "--model", metavar="MODEL", help="HF folder, hub name or Megatron checkpoint (default: the run's initial model)"
    )
    parser.add_argument("--responses", metavar="N", type=positive, default=400, help="responses to use (default: 400)")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="seed for choosing the responses (default: 1)")


def _add_behaviours(kinds: Commands) -> None:
    parser = _add_kind(
        kinds,
        "behaviours",
        _behaviours,
        "subgoal setting, enumeration, verification and backtracking, found by a judge model; resumes if interrupted",
    )
    parser.add_argument(
        "--url", metavar="URL", required=True, help="OpenAI-compatible endpoint, such as http://127.0.0.1:30000/v1"
    )
    parser.add_argument("--judge", metavar="NAME", required=True, help="name of the judge model at the endpoint")
    parser.add_argument("--responses", metavar="N", type=positive, default=64, help="responses per step (default: 64)")
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="seed for choosing the responses (default: 1)")
    parser.add_argument(
        "--concurrency", metavar="N", type=positive, default=16, help="concurrent requests (default: 16)"
    )
    parser.add_argument(
        "--api-key-variable", metavar="NAME", help="environment variable with the endpoint's API key (default: no key)"
    )


def _add_pass_at_k(kinds: Commands) -> None:
    parser = add_command(kinds, "pass-at-k", _pass_at_k, "Pass@K curves of several evaluations in one figure")
    parser.add_argument(
        "evaluations",
        metavar="LABEL=DIR,DIR",
        nargs="+",
        help="a label, and one run folder or output folder of dsrl eval per run; or just one DIR",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path(), help="output folder (default: .)")


def _thoughts(options: argparse.Namespace) -> int:
    from megatron_dsrl.analysis import thoughts
    from megatron_dsrl.analysis.responses import read_responses

    steps = read_responses(options.source, options.steps)
    records = [thoughts.thoughts_of_step(step, responses) for step, responses in steps]
    return _finish(options, "thoughts", records, thoughts.summary(records), thoughts.charts(records, _phases(options)))


def _problems(options: argparse.Namespace) -> int:
    from megatron_dsrl.analysis import problems
    from megatron_dsrl.analysis.responses import read_steps

    visits = problems.visits(read_steps(options.source, options.steps))
    if not visits:
        raise UserError(f"{options.source}: the recorded rollouts of these steps are empty")
    records = problems.by_step(visits)
    return _finish(options, "problems", records, problems.summary(visits), problems.charts(records, _phases(options)))


def _lengths(options: argparse.Namespace) -> int:
    from megatron_dsrl.analysis import lengths
    from megatron_dsrl.analysis.responses import read_steps
    from megatron_dsrl.observability.records import METRICS_FILE, read_records

    metrics = {record["step"]: record for record in read_records(options.source / METRICS_FILE)}
    steps = read_steps(options.source, options.steps)
    records = [lengths.lengths_of_step(step, groups, metrics) for step, groups in steps]
    return _finish(options, "lengths", records, lengths.summary(records), lengths.charts(records, _phases(options)))


def _behaviours(options: argparse.Namespace) -> int:
    from rich.progress import Progress

    from megatron_dsrl.analysis import behaviours
    from megatron_dsrl.analysis.judge import JudgeEndpoint, first_failures, judge_responses
    from megatron_dsrl.analysis.outputs import in_words, output_folder, write_summary
    from megatron_dsrl.analysis.responses import choose, read_responses

    endpoint = JudgeEndpoint(
        options.url, options.judge, _key(options.api_key_variable), concurrency=options.concurrency
    )
    steps = [
        (step, choose(list(enumerate(responses)), options.responses, options.seed))
        for step, responses in read_responses(options.source, options.steps)
    ]
    folder = output_folder(options.source, options.output)
    with Progress() as progress:
        task = progress.add_task("judging", total=sum(len(chosen) for _, chosen in steps))
        result = judge_responses(steps, endpoint, folder / "behaviours.jsonl", lambda: progress.advance(task))
    if not result.verdicts:
        raise UserError(f"the judge answered none of the questions: {'; '.join(first_failures(result.failures))}")
    records = behaviours.behaviours_by_step(result.verdicts)
    summary = behaviours.summary(records) | {"questions_without_answer": len(result.failures), "steps": records}
    write_summary(folder, "behaviours", summary, behaviours.charts(records, _phases(options)))
    print(in_words(summary))
    if result.failures:
        print(*first_failures(result.failures), sep="\n", file=sys.stderr)
        print("run the same command again to retry these questions", file=sys.stderr)
    return 1 if result.failures else 0


def _gradients(options: argparse.Namespace) -> int:
    with loading_megatron(sys.stderr):
        from megatron_dsrl.analysis.alignment import charts, summary
        from megatron_dsrl.analysis.outputs import check_writable, output_folder
        from megatron_dsrl.analysis.scoring import analyse_gradients, gradient_settings
        from megatron_dsrl.common.collective import rank
        from megatron_dsrl.model.parallel import destroy_parallel

    config = gradient_settings(options.source, options.model, options.overrides)
    check_writable(output_folder(options.source, options.output))
    responses = analyse_gradients(options.source, config, options.steps, options.responses, options.seed)
    records = []
    try:
        for response in responses:
            records.append(response.as_record())
            if rank() == 0:
                _print_gradients(len(records), records[-1])
        if rank() == 0:
            _finish(options, "gradients", records, summary(records), charts(records))
    finally:
        destroy_parallel()
    return 0


def _print_gradients(number: int, record: dict) -> None:
    cosine = "none" if record["cosine"] is None else f"{record['cosine']:.3f}"
    print(
        f"{number}: problem {record['problem']}, {record['tokens']} tokens, cosine {cosine}, "
        f"inner product {record['inner_product']:.4g}, mean gap {record['mean_gap'] or 0.0:.3f}",
        flush=True,
    )


def _pass_at_k(options: argparse.Namespace) -> int:
    """Compare several evaluations in pass_at_k.svg, pass_at_k.md and pass_at_k.jsonl."""
    from megatron_dsrl.analysis import pass_at_k_curves as curves
    from megatron_dsrl.charts.figure import write_figure
    from megatron_dsrl.common.disk import write_result
    from megatron_dsrl.evaluation.results import newest_results
    from megatron_dsrl.observability.records import replace_records

    labelled = labelled_folders(options.evaluations)
    evaluations = {label: [newest_results(folder) for folder in folders] for label, folders in labelled.items()}
    charts = curves.charts(evaluations)
    write_figure(charts, options.output / "pass_at_k.svg")
    write_result(options.output / "pass_at_k.md", curves.table(evaluations))
    replace_records(options.output / "pass_at_k.jsonl", curves.records(evaluations))
    print(curves.table(evaluations), end="")
    return 0


def _finish(options: argparse.Namespace, name: str, records: Sequence[dict], summary: dict, charts: Sequence) -> int:
    """Write the results, and print the summary and their location."""
    from megatron_dsrl.analysis.outputs import in_words, output_folder, write_analysis

    folder = output_folder(options.source, options.output)
    write_analysis(folder, name, records, summary, charts)
    print(in_words(summary))
    print(f"\nwritten to {folder / name}.jsonl, .json and .svg")
    return 0


def _phases(options: argparse.Namespace) -> Sequence:
    """The run's phases; a sample file, and the rollouts of `dsrl rollout`, have none."""
    from megatron_dsrl.observability.records import METRICS_FILE
    from megatron_dsrl.observability.run_records import read_run

    return read_run(options.source).phases if (options.source / METRICS_FILE).is_file() else []


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise UserError(f"--api-key-variable: {variable} is not set")
    return os.environ[variable]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,10,20, got {text}") from error
