"""`dsrl rollout` and `serve`, which sample without a trainer, and `samples`. torch is only imported when one runs."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dsrl.commands.arguments import Commands, add_command, positive, read_config
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import launched_rank, launched_world_size
from megatron_dsrl.run.loading import loading_megatron

if TYPE_CHECKING:
    from megatron_dsrl.analysis.sample_view import ResponseLogProbs
    from megatron_dsrl.rollout.sample import Sample, SampleGroup

DEFAULT_PROMPTS = 4


def add_rollout(commands: Commands) -> None:
    parser = add_command(
        commands,
        "rollout",
        _rollout,
        "sample the steps of a run, without training",
        epilog="example: dsrl rollout configs/tiny_dsrl.yaml name=sampled steps=2",
    )
    parser.add_config()
    parser.add_processes()


def _rollout(options: argparse.Namespace) -> int:
    """Sample the steps of a run with its initial weights, without a trainer. A run with rollout.replay_from can train
    on the result without engines."""
    from megatron_dsrl.run.preflight import preflight

    config = read_config(options)
    preflight(config, launched_world_size())
    with loading_megatron():
        from megatron_dsrl.run.rollout_only import sample_run

    sample_run(config)
    return 0


def add_serve(commands: Commands) -> None:
    parser = add_command(
        commands,
        "serve",
        _serve,
        "start an SGLang server for a run with engine.urls",
        epilog="example: dsrl serve examples/asynchronous/run.yaml --port 30000",
    )
    parser.add_config()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=30000, help="port to listen on (default: %(default)s)")


def _port(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text}")
    return value


def _serve(options: argparse.Namespace) -> int:
    """Start an SGLang server for a run that names it in engine.urls, with the settings of the run's engine section, and
    keep it running until it is stopped (Ctrl-C). Callers need the key in the environment variable DSRL_ENGINE_API_KEY,
    if it is set."""
    from megatron_dsrl.run.serving import serve

    serve(read_config(options), options.host, options.port)
    return 0


def add_samples(commands: Commands) -> None:
    parser = add_command(
        commands,
        "samples",
        _samples,
        "read a run's recorded samples, with their token log-probs in both spaces",
        epilog="split the model: dsrl samples RUN --log-probs --processes 2 parallel.tensor_parallel_size=2",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, such as runs/tiny_dsrl")
    parser.add_argument("--step", metavar="N", type=positive, help="step to print (default: the last recorded one)")
    parser.add_argument("--prompt", metavar="N", type=int, help="print only this prompt, by its row in the prompt set")
    parser.add_argument(
        "--limit", metavar="N", type=positive, help=f"prompts to print without --prompt (default: {DEFAULT_PROMPTS})"
    )
    parser.add_argument("--tokens", action="store_true", help="add a table of tokens with the engine's log-probs")
    parser.add_argument(
        "--log-probs",
        action="store_true",
        help="the same, with log P(y|x) and log P(y) from the Megatron actor: under the policy that sampled the "
        "responses, if it was exported, else under the newest export before it",
    )
    parser.add_argument("--model", metavar="MODEL", help="with --log-probs: use this model instead")
    parser.add_overrides("with --log-probs: set a field of `model` or `parallel`, or `temperature` or `bos`")
    parser.add_processes(", to split the model for --log-probs")


def _samples(options: argparse.Namespace) -> int:
    """Print recorded samples: prompts, responses, rewards, why they ended, and the engine's log-probs."""
    from rich.console import Console

    from megatron_dsrl.analysis.responses import read_steps, recorded_steps
    from megatron_dsrl.analysis.sample_view import print_group

    step = options.step or recorded_steps(options.run)[-1]
    ((_, recorded),) = read_steps(options.run, [step])
    groups = _chosen(recorded, options.prompt, options.limit or DEFAULT_PROMPTS, step)
    scores = _log_probs(options, groups) if options.log_probs else {}
    if launched_rank() == 0:  # the other ranks only take part in the computation
        token_text = _token_text(options) if options.tokens or options.log_probs else None
        console = Console(highlight=False)
        console.print(f"step {step}: {len(groups)} of {len(recorded)} prompts\n", style="bold")
        for group in groups:
            print_group(group, [scores.get(id(sample)) for sample in group.samples], token_text, console)
    return 0


def _chosen(groups: "Sequence[SampleGroup]", prompt: int | None, limit: int, step: int) -> "list[SampleGroup]":
    if prompt is None:
        return list(groups[:limit])
    chosen = [group for group in groups if group.prompt.index == prompt]
    if not chosen:
        there = sorted(group.prompt.index for group in groups)
        raise UserError(f"--prompt {prompt}: step {step} has the prompts {', '.join(map(str, there))}")
    return chosen


def _log_probs(options: argparse.Namespace, groups: "Sequence[SampleGroup]") -> "dict[int, ResponseLogProbs]":
    """Log-probs of every sample with tokens, by its `id`."""
    with loading_megatron(sys.stderr):
        from megatron_dsrl.analysis.scoring import TokenisedResponse, gradient_settings, token_log_probs
        from megatron_dsrl.model.parallel import destroy_parallel

    samples = [(group, sample) for group in groups for sample in group.samples if sample.response_ids]
    if not samples:
        return {}
    model, remark = _model(options, [sample for _, sample in samples])
    config = gradient_settings(options.run, model, options.overrides)
    if launched_rank() == 0:
        print(f"token log-probs under {config.model.path}{remark}", flush=True)
    responses = [
        TokenisedResponse(
            0, group.prompt.index, 0, sample.reward, group.prompt.token_ids, sample.response_ids, sample.scored
        )
        for group, sample in samples
    ]
    try:
        scores = token_log_probs(config, responses)
    finally:
        destroy_parallel()
    return {id(sample): score for (_, sample), score in zip(samples, scores, strict=True)}


def _model(options: argparse.Namespace, samples: "Sequence[Sample]") -> tuple[str | None, str]:
    """The model for `--log-probs` (None: the run's initial model), and a description of its weights."""
    from megatron_dsrl.analysis.scoring import newest_export, sampling_step

    if options.model is not None:
        return options.model, ""
    sampled_by = sampling_step(samples[0])
    export, step = newest_export(options.run, sampled_by)
    model = None if export is None else str(export)
    words = f": the policy after step {step}" if step else ": the run's initial model"
    if step == sampled_by:
        return model, f"{words}, which sampled them"
    return model, (
        f"{words}; the one after step {sampled_by}, which sampled them, is not exported "
        "(checkpoint.export_hf_every_steps, or --model)"
    )


def _token_text(options: argparse.Namespace) -> Callable[[int], str]:
    with loading_megatron(sys.stderr):
        from megatron_dsrl.analysis.scoring import gradient_settings
        from megatron_dsrl.data.tokenizer import decode, load_tokenizer
        from megatron_dsrl.model.source import resolve_model_folder

    config = gradient_settings(options.run, options.model, options.overrides)
    tokenizer = load_tokenizer(str(resolve_model_folder(config.model.path)))
    return lambda token: decode(tokenizer, [token], skip_special_tokens=False)
