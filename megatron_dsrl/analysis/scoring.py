"""Recorded responses under a model, in both spaces: their gradients (`dsrl analyse gradients`) and the log-probs of
their tokens (`dsrl samples --log-probs`). All ranks run it.

In the post-train space a response is scored given its prompt, log P(y|x); in the pre-train space without it, log P(y).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_dsrl.actor.sharded_model import ShardedModel
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain
from megatron_dsrl.analysis.alignment import ScoredResponse
from megatron_dsrl.analysis.gradients import LogProbGradients, scores_of_row
from megatron_dsrl.analysis.responses import choose, read_steps, recorded_steps
from megatron_dsrl.analysis.sample_view import ResponseLogProbs
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import launched_world_size
from megatron_dsrl.common.step_names import by_step
from megatron_dsrl.config.load import apply_override
from megatron_dsrl.config.model import GradientAnalysisConfig, ParallelConfig
from megatron_dsrl.config.validate import validated
from megatron_dsrl.config.yaml_text import KeyPath
from megatron_dsrl.data.tokenizer import context_token_ids, load_tokenizer, turn_end
from megatron_dsrl.evaluation.sample_file import ProblemResult, SampleResult, read_sample_file
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.model.build import build_model, build_trainable
from megatron_dsrl.model.parallel import parallel_layout
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.observability.records import EXPORTS_FOLDER, read_records
from megatron_dsrl.observability.run_records import read_run
from megatron_dsrl.rollout.sample import Sample
from megatron_dsrl.weights.load import load_weights
from megatron_dsrl.weights.table import weight_table


@dataclass(frozen=True)
class TokenisedResponse:
    """A response as the trainer sees it."""

    step: int
    problem: int
    number: int
    reward: float
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    scored: tuple[bool, ...] | None = None
    """Which response tokens are the policy's; None means all."""


def gradient_settings(source: Path, model: str | None, overrides: Sequence[str]) -> GradientAnalysisConfig:
    """The source's settings (model, temperature and BOS of a run; temperature of a sample file), changed as requested.
    Raises UserError if no model is named, or a setting is invalid.

    Args:
        model: HF folder, hub name or Megatron checkpoint; None: the model that the run started from.
        overrides: `key.path=value` of `GradientAnalysisConfig`.
    """
    data = _settings_of_run(source) if source.is_dir() else _settings_of_sample_file(source)
    if model is not None:
        data.setdefault("model", {})["path"] = model
    places: dict[KeyPath, str] = {}
    for override in overrides:
        apply_override(data, override, places)
    if "path" not in data.get("model", {}):
        raise UserError(f"{source} does not name a model: choose one with --model")
    return validated(GradientAnalysisConfig, data, places, "dsrl analyse gradients", "overrides")


def analyse_gradients(
    source: Path, config: GradientAnalysisConfig, steps: Sequence[int] | None, limit: int, seed: int
) -> Iterator[ScoredResponse]:
    """Yield the chosen responses with their comparison as they are computed. Collective over the ranks. Raises
    UserError if the source or the model is missing, or they do not fit together.

    Args:
        steps: steps of a run; None: the first recorded one, which was sampled with the model that the run started from.
        limit: number of responses, drawn from all of the steps.
    """
    folder = resolve_model_folder(config.model.path)
    architecture = read_architecture(folder)
    tokenizer = load_tokenizer(str(folder), architecture.vocab_size)
    pre_train, post_train = PreTrain(bos=config.bos), PostTrain()
    bos_ids = context_token_ids(tokenizer, pre_train.context_text)
    responses = choose_responses(source, steps, limit, seed, tokenizer)
    with scoring_model(config, folder, architecture, responses) as model:
        gradients = LogProbGradients(model, architecture.vocab_size, config.temperature)
        for response in responses:
            comparison = gradients.compare(
                pre_train.sequence((), response.response_ids, bos_ids, response.scored),
                post_train.sequence(response.prompt_ids, response.response_ids, scored=response.scored),
            )
            yield ScoredResponse(response.step, response.problem, response.number, response.reward, comparison)


def token_log_probs(config: GradientAnalysisConfig, responses: Sequence[TokenisedResponse]) -> list[ResponseLogProbs]:
    """Log-probs under the configured model and temperature of responses with at least one token. Collective over the
    ranks. Raises UserError if a response is too long for the model, or the layout does not fit."""
    folder = resolve_model_folder(config.model.path)
    architecture = read_architecture(folder)
    pre_train, post_train = PreTrain(bos=config.bos), PostTrain()
    bos_ids = context_token_ids(load_tokenizer(str(folder), architecture.vocab_size), pre_train.context_text)
    sequences = [post_train.sequence(one.prompt_ids, one.response_ids, scored=one.scored) for one in responses]
    sequences += [pre_train.sequence((), one.response_ids, bos_ids, one.scored) for one in responses]
    with scoring_model(config, folder, architecture, responses) as model:
        scores = model.score_tokens(
            sequences, lambda row, logits: scores_of_row(row, logits, architecture.vocab_size, config.temperature)[0]
        )
    lengths = [len(one.response_ids) for one in responses]
    values = [
        sequence.spread_scored(score.tolist(), length)
        for sequence, score, length in zip(sequences, scores, lengths * 2, strict=True)
    ]
    return [ResponseLogProbs(*pair) for pair in zip(values[: len(responses)], values[len(responses) :], strict=True)]


def sampling_step(sample: Sample) -> int:
    """Number of steps after which the policy had the weights that finished this sample; 0: the run's initial model."""
    return max(sample.weight_version, 1) - 1


def newest_export(run_folder: Path, step: int) -> tuple[Path | None, int]:
    """A run's newest exported policy up to this step, and its step; (None, 0) without one, for the initial model."""
    exports = by_step(run_folder / EXPORTS_FOLDER)
    newest = max((number for number in exports if number <= step), default=0)
    return exports.get(newest), newest


@contextmanager
def scoring_model(
    config: GradientAnalysisConfig,
    folder: Path,
    architecture: Architecture,
    responses: Sequence[TokenisedResponse],
) -> Iterator[ShardedModel]:
    """Context with the model, whose weights are in `folder`, sharded over all ranks. Collective. Raises UserError if a
    response is too long for the model, or the layout does not fit."""
    _check_lengths(responses, architecture.max_position_embeddings)
    # The distributed optimizer would shard the gradients.
    parallel = config.parallel.model_copy(update={"distributed_optimizer": False})
    _check_replicas(parallel)
    with parallel_layout(parallel, seed=0):
        chunks = build_model(architecture, config.model, parallel)
        load_weights(chunks, weight_table(architecture), folder)
        # Every sequence gets its own row: only one is scored at a time.
        yield ShardedModel(build_trainable(chunks, parallel), max_tokens_per_micro_batch=1)


def choose_responses(
    source: Path, steps: Sequence[int] | None, limit: int, seed: int, tokenizer: PreTrainedTokenizerBase
) -> list[TokenisedResponse]:
    """At most `limit` responses of the source.

    Responses of a run have the engine's token ids. Those of a sample file are tokenised from text, with an
    end-of-turn token unless they were truncated.
    """
    if not source.is_dir():
        problems = read_sample_file(source)
        samples = [(problem, number) for problem in problems for number in range(len(problem.samples))]
        chosen = [_tokenised(problem, number, tokenizer) for problem, number in choose(samples, limit, seed)]
        return [response for response in chosen if response.response_ids]
    chosen = [
        TokenisedResponse(
            step,
            group.prompt.index,
            number,
            sample.reward,
            group.prompt.token_ids,
            sample.response_ids,
            sample.scored,
        )
        for step, groups in read_steps(source, steps or recorded_steps(source)[:1])
        for group in groups
        for number, sample in enumerate(group.samples)
        if sample.response_ids
    ]
    return choose(chosen, limit, seed)


def _tokenised(problem: ProblemResult, number: int, tokenizer: PreTrainedTokenizerBase) -> TokenisedResponse:
    sample: SampleResult = problem.samples[number]
    text = sample.text if sample.truncated else sample.text + turn_end(tokenizer)
    prompt_ids, response_ids = (tokenizer.encode(part, add_special_tokens=False) for part in (problem.prompt, text))
    return TokenisedResponse(0, problem.index, number, sample.reward, tuple(prompt_ids), tuple(response_ids))


def _settings_of_run(folder: Path) -> dict[str, Any]:
    config = read_run(folder).config
    objectives = [one for phase in config.get("phases", []) for one in (phase, *phase.get("additional_objectives", []))]
    settings: dict[str, Any] = {"model": dict(config.get("model", {}))}
    if "temperature" in config.get("rollout", {}):
        settings["temperature"] = config["rollout"]["temperature"]
    bos = [objective["space"]["bos"] for objective in objectives if "bos" in objective.get("space", {})]
    return settings | ({"bos": bos[0]} if bos else {})


def _settings_of_sample_file(path: Path) -> dict[str, Any]:
    """The temperature of the evaluation; greedy samples are scored at temperature 1."""
    records = read_records(path)
    if not records:
        raise UserError(f"{path} is neither a run folder nor a sample file of `dsrl eval`")
    temperature = (records[0].get("benchmark") or {}).get("temperature")
    return {"temperature": temperature} if temperature else {}


def _check_lengths(responses: Sequence[TokenisedResponse], context_tokens: int) -> None:
    longest = max((len(r.prompt_ids) + len(r.response_ids) for r in responses), default=0)
    if longest == 0:
        raise UserError("no response has tokens to analyse")
    if longest > context_tokens:
        raise UserError(
            f"a prompt and its response have {longest} tokens, but the model takes {context_tokens}: choose the model "
            "that sampled it"
        )


def _check_replicas(parallel: ParallelConfig) -> None:
    replicas, odd = divmod(launched_world_size(), parallel.model_parallel_size)
    if not odd and replicas > 1 and parallel.expert_parallel_size == 1:
        raise UserError(
            f"{replicas} replicas of the model, but only one would work: split the model over the processes, for "
            "example with parallel.tensor_parallel_size, or start fewer"
        )
