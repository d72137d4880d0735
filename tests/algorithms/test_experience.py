"""From judged responses to scored sequences: the two spaces and the sample filters, worked by hand."""

import pytest
import torch

from megatron_dsrl.algorithms.advantages import GroupMean
from megatron_dsrl.algorithms.experience import Experience, Response, build_experience
from megatron_dsrl.algorithms.objective import with_advantages
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain
from megatron_dsrl.config.phase import PhaseConfig

BOS = [7]
PROMPT = (1, 2, 3)


def response(tokens, reward, group=0, prompt=PROMPT) -> Response:
    return Response(prompt, tokens, [-0.1 * token for token in tokens], reward, group)


BATCH = [
    response((10, 11, 12), 1.0),
    response((20, 21), 0.0),
    response((30,), 0.0),
    response((40, 41), 0.0),
    response((50, 51), 0.0, group=1),
    response((60, 61), 0.0, group=1),
]


def experience_in(phase, bos_ids=BOS, batch=BATCH) -> Experience:
    return with_advantages(build_experience(batch, phase.space, bos_ids), phase)


def phase(space, kind="all") -> PhaseConfig:
    return PhaseConfig(name="phase", space=space, advantage=GroupMean(), filter=kind)


def test_post_train_space_scores_the_response_behind_the_prompt() -> None:
    experience = experience_in(phase(PostTrain()))
    assert list(experience.sequences[0].token_ids) == [1, 2, 3, 10, 11, 12]
    assert [s.num_scored for s in experience.sequences] == [3, 2, 1, 2, 2, 2]
    assert [a.unique().tolist() for a in experience.advantages] == [[0.75], [-0.25], [-0.25], [-0.25], [0.0], [0.0]]


def test_pre_train_space_puts_bos_in_the_place_of_the_prompt() -> None:
    experience = experience_in(phase(PreTrain()))
    assert list(experience.sequences[0].token_ids) == [7, 10, 11, 12]
    assert [s.num_scored for s in experience.sequences] == [3, 2, 1, 2, 2, 2]
    torch.testing.assert_close(experience.engine_log_probs[0], torch.tensor([-1.0, -1.1, -1.2]))


def test_without_bos_the_first_token_is_context_and_a_lone_token_drops_out() -> None:
    experience = experience_in(phase(PreTrain(bos="none")), [])
    assert list(experience.sequences[0].token_ids) == [10, 11, 12]
    assert [s.num_scored for s in experience.sequences] == [2, 1, 1, 1, 1]
    torch.testing.assert_close(experience.engine_log_probs[0], torch.tensor([-1.1, -1.2]))


@pytest.mark.parametrize(("kind", "kept"), [("negative", [(20, 21), (30,), (40, 41)]), ("positive", [(10, 11, 12)])])
def test_filters_keep_one_sign_and_drop_uniform_groups(kind, kept) -> None:
    experience = experience_in(phase(PreTrain(), kind))
    assert [tuple(s.token_ids[1:]) for s in experience.sequences] == kept


def test_pre_train_experience_does_not_depend_on_the_prompt() -> None:
    other = [response(r.response_ids, r.reward, r.group, prompt=(99, 98)) for r in BATCH]
    one, two = (experience_in(phase(PreTrain(), "negative"), batch=batch) for batch in (BATCH, other))
    assert one.sequences == two.sequences and torch.equal(torch.cat(one.advantages), torch.cat(two.advantages))


def test_bad_rewards_and_misaligned_log_probs_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        build_experience([response((1,), float("nan"))], PostTrain(), BOS)
    with pytest.raises(ValueError, match="2 response tokens but 1"):
        build_experience([Response(PROMPT, (1, 2), (-0.5,), 1.0, 0)], PostTrain(), BOS)


def test_mini_batches_share_the_sequences_in_order() -> None:
    experience = experience_in(phase(PostTrain()))
    parts = experience.mini_batches(4)
    assert [len(part) for part in parts] == [1, 2, 1, 2]
    assert sum((part.sequences for part in parts), ()) == experience.sequences
