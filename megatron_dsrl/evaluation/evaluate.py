"""Evaluation of a model on benchmarks: `dsrl eval`.

Every rank runs it. Engines start as in training; rank 0 samples from all of them, judges and writes the results.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_dsrl.common.checksum import fingerprint
from megatron_dsrl.common.collective import barrier, on_first, rank
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.folder_lock import locked
from megatron_dsrl.common.waiting import waiting
from megatron_dsrl.config.benchmark import Benchmark, BenchmarkRunConfig, load_benchmark, repeated_greedy_samples
from megatron_dsrl.config.load import apply_override
from megatron_dsrl.config.validate import validated
from megatron_dsrl.config.yaml_text import KeyPath
from megatron_dsrl.conversion.convert import ConversionOptions, convert_megatron_to_hf
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.prompts import load_prompts
from megatron_dsrl.data.tokenizer import decode, encode, load_tokenizer, stop_token_ids
from megatron_dsrl.evaluation.benchmark_evaluator import evaluate_benchmark, missing_samples, reward_section
from megatron_dsrl.evaluation.find_model import EvaluatedModel, find_model
from megatron_dsrl.evaluation.results import EVALUATIONS_FOLDER, markdown, write_results
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.parallel import process_group
from megatron_dsrl.provenance.inputs import describe_model, describe_prompts
from megatron_dsrl.provenance.start import Details, record_start
from megatron_dsrl.rewards.registry import check_reward, describe_verifiers, matched_by_spelling
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.run_engines import awaiting_engines
from megatron_dsrl.weights.hf_writer import FILE_BYTES

SET_BY_BENCHMARK = {
    "rollout.temperature": "use --temperature",
    "rollout.top_p": "use --top-p",
    "rollout.top_k": "change it in a benchmark file of your own",
    "rollout.max_response_tokens": "use --max-tokens",
    "rollout.samples_per_prompt": "use --samples",
    "reward.function": "change it in a benchmark file of your own, or use `dsrl rescore --verifier`",
    "reward.options": "change them in a benchmark file of your own",
}
"""Fields of a run that have no effect on an evaluation, and what has."""


@dataclass(frozen=True)
class EvaluationRequest:
    """The arguments of `dsrl eval`."""

    model: str
    """HF folder, hub name, Megatron checkpoint, or run folder; see `find_model`."""
    benchmarks: Sequence[str]
    """Names, or paths of YAML files."""
    output: Path | None = None
    """Folder of samples and results; an evaluation in it is continued. None: `<run folder>/evaluation/step_000050` for
    a run's policy, `evaluations/<model>` for other models."""
    data_folder: Path | None = None
    """Folder of the benchmarks' problem files; None: use the hub."""
    changes: dict[str, Any] | None = None
    """Benchmark fields to replace."""
    overrides: Sequence[str] = ()
    """`key.path=value` of `BenchmarkRunConfig`, such as `engine.tensor_parallel_size=2`."""


def requested_benchmarks(request: EvaluationRequest) -> list[Benchmark]:
    """The benchmarks of a request, with its changes. Reads neither the model nor problems. Raises UserError if a name,
    a change or an override is invalid."""
    benchmarks = [load_benchmark(name, request.data_folder, request.changes) for name in request.benchmarks]
    _check_benchmarks(benchmarks)
    _config(Path(request.model), request.overrides, benchmarks)
    return benchmarks


def read_problems(folder: Path, benchmarks: Sequence[Benchmark]) -> dict[str, list[Prompt]]:
    """The prompts of every benchmark, by its name, from files or the hub. The folder has config.json and tokenizer of
    the evaluated model. Raises UserError if problems cannot be read, or are too long for the model."""
    architecture = read_architecture(folder)
    tokenizer = load_tokenizer(str(folder), architecture.vocab_size)
    prompts = {b.name: load_prompts(b.config, tokenizer, f"benchmark {b.name}") for b in benchmarks}
    for benchmark in benchmarks:
        _say_what_is_matched_by_spelling(benchmark, prompts[benchmark.name])
    _check_lengths(benchmarks, prompts, architecture.max_position_embeddings)
    return prompts


def evaluate(request: EvaluationRequest) -> EvaluatedModel:
    """Evaluate, or continue an evaluation. All ranks call it; rank 0 prints the results. Returns the model that the
    request names. Raises UserError, before the engines start, if an input is missing or invalid, or another process is
    using the output folder."""
    benchmarks = requested_benchmarks(request)
    with process_group(), ExitStack() as resources:
        model = on_first(lambda: find_model(request.model))
        prompts: dict[str, list[Prompt]] = {}
        # Only rank 0 needs the prompts, and the ranks should not query the hub concurrently.
        with waiting("reading tokenizer and problems"):
            on_first(lambda: prompts.update(read_problems(model.companions, benchmarks)))
        output = request.output or default_output(model)
        resources.enter_context(locked(output, print))
        folder = hf_folder(model, output)
        tokenizer = load_tokenizer(str(folder), read_architecture(folder).vocab_size)
        config = _config(folder, request.overrides, benchmarks)
        settings: dict[str, Any] = {"model": fingerprint(folder), "dtype": config.model.dtype, "seed": config.seed}
        if config.rollout.generate is not None:
            settings["generate"] = {config.rollout.generate: config.rollout.generate_options}
        files = {b.name: output / "samples" / f"{b.name}.jsonl" for b in benchmarks}
        unfinished = on_first(
            lambda: [b.name for b in benchmarks if missing_samples(b, prompts[b.name], files[b.name], settings)]
        )
        stops = stop_token_ids(tokenizer, folder)
        rollout = None
        if unfinished:
            on_first(lambda: _check_verifiers(benchmarks))
            _record_start(output, request.model, folder, model.step, benchmarks, prompts)
            rollout = start_engines(config, output, tokenizer, stops, resources)

        def evaluate_all() -> None:
            """Evaluate the benchmarks in turn; results.json is rewritten after each."""
            summaries = {}
            for benchmark in benchmarks:
                summaries[benchmark.name] = evaluate_benchmark(
                    benchmark, prompts[benchmark.name], rollout, stops, files[benchmark.name], settings
                )
                write_results(output, model.name, summaries, model.step)
            print(markdown(model.name, summaries))
            print(f"written to {output}")

        if rollout:
            rollout.while_sampling(evaluate_all, recover=rollout.restart_engines)
        elif rank() == 0:
            evaluate_all()
        barrier()  # the engines of other ranks must stay until the last sample has arrived
    return model


def _record_start(
    output: Path,
    model: str,
    folder: Path,
    step: int | None,
    benchmarks: Sequence[Benchmark],
    prompts: dict[str, list[Prompt]],
) -> None:
    """Record the start of an evaluation, and print how verifiers run. Collective; only rank 0 has the prompts."""
    verifiers = describe_verifiers(b.config.reward for b in benchmarks) if rank() == 0 else []
    for line in verifiers:
        print(line)
    details: Details = {
        "after_step": lambda: step,
        "model": lambda: describe_model(model, folder),
        "evaluation_sets": lambda: {one.name: describe_prompts(one.config, prompts[one.name]) for one in benchmarks},
        "verifiers": lambda: verifiers,
    }
    record_start(output, "eval", details, print)


def start_engines(
    config: BenchmarkRunConfig,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    stops: tuple[int, ...],
    resources: ExitStack,
) -> EngineRollout:
    """Start engines and wait until they are ready. Logs go to the output folder; `resources` closes the engines."""
    rollout = EngineRollout(config, output, stops, partial(decode, tokenizer), encode=partial(encode, tokenizer))
    resources.callback(rollout.close)
    with awaiting_engines(config, output):
        rollout.wait_until_ready()
    return rollout


def default_output(model: EvaluatedModel) -> Path:
    """Default folder of the results. The report of a run looks for them in the run folder."""
    if model.run_folder is not None:
        return model.run_folder / EVALUATIONS_FOLDER / f"step_{model.step:06d}"
    return Path("evaluations") / PurePath(model.name).name


def hf_folder(model: EvaluatedModel, output: Path) -> Path:
    """The model's HF folder. A Megatron checkpoint is first converted into the output folder. Collective. Raises
    UserError if the checkpoint cannot be converted."""
    if not model.is_megatron:
        return model.folder
    # The fingerprint tells it from other checkpoints, and from the same folder after more training.
    converted = output / f"hf_model_{on_first(lambda: fingerprint(model.folder))[:12]}"
    if not on_first(converted.exists):
        options = ConversionOptions(dtype=None, verify=False, overwrite=False, expect=None)
        convert_megatron_to_hf(model.folder, converted, FILE_BYTES, options, model.companions)
    return converted


def _config(folder: Path, overrides: Sequence[str], benchmarks: Sequence[Benchmark]) -> BenchmarkRunConfig:
    max_prompt_tokens = max(benchmark.config.max_prompt_tokens for benchmark in benchmarks)
    data: dict[str, Any] = {"model": {"path": str(folder)}, "data": {"max_prompt_tokens": max_prompt_tokens}}
    places: dict[KeyPath, str] = {}
    for override in overrides:
        apply_override(data, override, places)
        if (instead := SET_BY_BENCHMARK.get(override.partition("=")[0].strip())) is not None:
            raise UserError(f"override `{override}`: the benchmark sets this; {instead}")
    return validated(BenchmarkRunConfig, data, places, "dsrl eval", "overrides")


def _check_benchmarks(benchmarks: Sequence[Benchmark]) -> None:
    names = [benchmark.name for benchmark in benchmarks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise UserError(f"--benchmarks: {', '.join(twice)} twice" if twice else "--benchmarks: name at least one")
    for benchmark in benchmarks:
        config = benchmark.config
        if problem := repeated_greedy_samples(config.temperature, config.samples_per_prompt):
            raise UserError(f"benchmark {benchmark.name}: {problem}")


def _check_verifiers(benchmarks: Sequence[Benchmark]) -> None:
    for benchmark in benchmarks:
        check_reward(benchmark.config.reward, reward_section(benchmark))


def _say_what_is_matched_by_spelling(benchmark: Benchmark, prompts: Sequence[Prompt]) -> None:
    answers = matched_by_spelling(benchmark.config.reward.function, [prompt.answer for prompt in prompts])
    if answers:
        shown = ", ".join(map(repr, answers[:3])) + (", ..." if len(answers) > 3 else "")
        print(
            f"benchmark {benchmark.name}: {len(answers)} of {len(prompts)} gold answers can only be compared as "
            f"strings: {shown}"
        )


def _check_lengths(benchmarks: Sequence[Benchmark], prompts: dict[str, list[Prompt]], context_tokens: int) -> None:
    for benchmark in benchmarks:
        longest = max(len(prompt.token_ids) for prompt in prompts[benchmark.name])
        if longest + benchmark.config.max_response_tokens > context_tokens:
            raise UserError(
                f"benchmark {benchmark.name}: prompts of up to {longest} tokens and max_response_tokens = "
                f"{benchmark.config.max_response_tokens} do not fit into the model's {context_tokens}; lower "
                "--max-tokens"
            )
