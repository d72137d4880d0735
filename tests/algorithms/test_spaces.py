"""What a space scores, and in which context."""

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch

from megatron_dsrl.algorithms.advantages import GroupMean
from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain, ScoredSequence, Space
from megatron_dsrl.config.choices import SPACES
from megatron_dsrl.config.phase import PhaseConfig

PROMPT, RESPONSE, BOS = (1, 2, 3), (10, 11, 12, 13), (7,)


class PromptEnd(Space):
    """A custom space between the two: only the last tokens of the prompt are in the context."""

    kept_tokens: int = 1
    prompt_in_context: ClassVar[bool] = False
    metrics_prefix: ClassVar[str] = "prompt_end"

    def context(self, prompt_ids: Sequence[int], context_ids: Sequence[int]) -> Sequence[int]:
        return prompt_ids[-self.kept_tokens :]


def scored_tokens(sequence: ScoredSequence) -> list[int]:
    return [sequence.token_ids[position] for position in sequence.scored_positions]


@pytest.mark.parametrize(
    ("space", "context", "token_ids", "scored"),
    [
        (PostTrain(), (), (*PROMPT, *RESPONSE), [10, 11, 12, 13]),
        (PreTrain(), BOS, (*BOS, *RESPONSE), [10, 11, 12, 13]),
        (PreTrain(bos="none"), (), RESPONSE, [11, 12, 13]),
        (PromptEnd(kept_tokens=2), (), (2, 3, *RESPONSE), [10, 11, 12, 13]),
    ],
)
def test_every_response_token_is_scored_that_has_a_context(space, context, token_ids, scored) -> None:
    sequence = space.sequence(PROMPT, RESPONSE, context)
    assert (tuple(sequence.token_ids), scored_tokens(sequence)) == (token_ids, scored)
    assert sequence.num_scored == len(scored)


@pytest.mark.parametrize(
    ("space", "context", "scored"),
    [(PostTrain(), (), [10, 13]), (PreTrain(), BOS, [10, 13]), (PreTrain(bos="none"), (), [13])],
)
def test_any_subset_of_the_response_can_be_scored(space, context, scored) -> None:
    """Tokens of a tool stay in the context and are not scored."""
    response = Response(PROMPT, RESPONSE, (-1.0, -2.0, -3.0, -4.0), 1.0, 0, scored=(True, False, False, True))
    experience = build_experience([response], space, context)
    (sequence,) = experience.sequences
    assert scored_tokens(sequence) == scored and experience.num_scored == [len(scored)]
    engine = {10: -1.0, 13: -4.0}
    torch.testing.assert_close(experience.engine_log_probs[0], torch.tensor([engine[token] for token in scored]))


@pytest.mark.parametrize("bos", ["none", "im_start"])
def test_values_of_scored_tokens_go_back_to_their_places(bos) -> None:
    """Without BOS nothing predicts the first token, so it is not scored."""
    sequence = PreTrain(bos=bos).sequence((), (7, 8, 9, 10), (5,) * (bos != "none"), (True, False, True, True))
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    first = None if bos == "none" else 1.0
    assert sequence.spread_scored(sequence.select_scored(values).tolist(), 4) == [first, None, 3.0, 4.0]


def test_marks_of_older_weights_follow_the_mask() -> None:
    response = Response(PROMPT, RESPONSE, (-1.0,) * 4, 1.0, 0, older_tokens=3, scored=(True, False, True, True))
    experience = build_experience([response], PostTrain())
    assert [marks.tolist() for marks in experience.from_older_weights] == [[1.0, 1.0, 0.0]]


def test_empty_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt token"):
        PostTrain().sequence((), RESPONSE)
    with pytest.raises(ValueError, match="at least one response token"):
        PreTrain().sequence(PROMPT, ())


def test_a_custom_space_is_named_by_its_dotted_path() -> None:
    path = "tests.algorithms.test_spaces:PromptEnd"
    phase = PhaseConfig(name="p", space={"name": path, "kept_tokens": 2}, advantage=GroupMean())
    assert phase.space.kept_tokens == 2 and phase.model_dump()["space"] == {"name": path, "kept_tokens": 2}
    assert list(phase.space.sequence(PROMPT, RESPONSE).token_ids) == [2, 3, *RESPONSE]
    assert SPACES.names() == ["post_train", "pre_train"]
