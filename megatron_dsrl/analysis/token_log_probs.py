"""Token log-probs of recorded responses in both spaces, computed by the Megatron actor in a forward pass.

In the post-train space a response is scored given its prompt, log P(y|x); in the pre-train space without it, log P(y).
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain
from megatron_dsrl.analysis.analyse_gradients import TokenisedResponse, scoring_model
from megatron_dsrl.analysis.gradients import scores_of_row
from megatron_dsrl.analysis.sample_view import ResponseLogProbs
from megatron_dsrl.common.step_names import by_step
from megatron_dsrl.config.model import GradientAnalysisConfig
from megatron_dsrl.data.tokenizer import context_token_ids, load_tokenizer
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.observability.records import EXPORTS_FOLDER
from megatron_dsrl.rollout.sample import Sample


def both_spaces(config: GradientAnalysisConfig, responses: Sequence[TokenisedResponse]) -> list[ResponseLogProbs]:
    """Log-probs under the configured model and temperature. Collective over the ranks.

    Args:
        config: model, layout and scoring.
        responses: responses with at least one token each.

    Raises:
        UserError: a response is too long for the model, or the layout does not fit.
    """
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
