"""The rollout side over a real SGLang engine."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_dsrl.rollout.batch import BatchProgress, RolloutBatch
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.errors import EngineError, StaleWeightsError
from megatron_dsrl.rollout.engines.flattened_bucket import Bucket
from megatron_dsrl.rollout.rollout import unwatched
from megatron_dsrl.rollout.unfinished import UnfinishedGroup
from tests.support.engine import STOP_TOKEN_ID, batch_request, dispatch, numbered_prompts, transformers_log_probs
from tests.support.tiny_model import LONG_CONTEXT_TOKENS

LOG_PROB_TOLERANCE = 1e-4


@pytest.fixture
def policy(engine_rollout: EngineRollout, tiny_model_folder) -> Qwen3ForCausalLM:
    """The tiny model in Transformers, with its weights also in the engine."""
    model = Qwen3ForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    engine_rollout.load_weights(lambda: [list(model.named_parameters())], engine_rollout.weight_version + 1)
    return model


def perturb(model: Qwen3ForCausalLM, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def buckets_of_two(model: Qwen3ForCausalLM) -> Iterator[Bucket]:
    """Buckets whose tensors are overwritten when the next bucket is taken, as a trainer's reused buffer would be."""
    named = list(model.named_parameters())
    for first in range(0, len(named), 2):
        bucket = [(name, parameter.detach().clone()) for name, parameter in named[first : first + 2]]
        yield bucket
        for _, tensor in bucket:
            tensor.fill_(float("nan"))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_transformers(engine_rollout, policy, temperature) -> None:
    prompts = numbered_prompts(5)
    sampling = replace(engine_rollout.training_sampling, temperature=temperature)

    groups = engine_rollout.generate(prompts, 3, sampling, "test")

    assert [group.prompt for group in groups] == prompts
    for group in groups:
        assert len(group.samples) == 3
        for sample in group.samples:
            reference = transformers_log_probs(policy, group.prompt.token_ids, sample.response_ids, temperature)
            torch.testing.assert_close(torch.tensor(sample.log_probs), reference, atol=LOG_PROB_TOLERANCE, rtol=0)


def test_greedy_tokens_equal_transformers(engine_rollout, policy) -> None:
    prompts = numbered_prompts(4)
    greedy = replace(engine_rollout.training_sampling, temperature=0.0, stop_token_ids=())

    groups = engine_rollout.generate(prompts, 1, greedy, "test")

    for group in groups:
        prompt_ids = torch.tensor([group.prompt.token_ids])
        expected = policy.generate(prompt_ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, prompt_ids.shape[1] :
        ]
        assert list(group.samples[0].response_ids) == expected.tolist()


def test_responses_end_at_the_stop_token_or_are_marked_truncated(engine_rollout, policy) -> None:
    with torch.no_grad():  # a tied row that every hidden state likes makes the stop token frequent
        policy.get_input_embeddings().weight[STOP_TOKEN_ID] *= 4
    engine_rollout.load_weights(lambda: [list(policy.named_parameters())], engine_rollout.weight_version + 1)

    samples = [
        sample
        for group in engine_rollout.generate(numbered_prompts(6), 8, engine_rollout.training_sampling, "test")
        for sample in group.samples
    ]

    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert STOP_TOKEN_ID not in sample.response_ids[:-1]
        if sample.finish_reason == "stop":
            assert sample.response_ids[-1] == STOP_TOKEN_ID
        else:
            assert len(sample.response_ids) == engine_rollout.training_sampling.max_response_tokens


def test_pushed_weights_replace_the_policy_and_its_version(engine_rollout, policy) -> None:
    prompts = numbered_prompts(4)
    before = engine_rollout.generate(prompts, 2, engine_rollout.training_sampling, "test")  # fills the prefix cache
    perturb(policy, seed=3)
    version = engine_rollout.weight_version + 1

    engine_rollout.load_weights(lambda: buckets_of_two(policy), version)
    after = engine_rollout.generate(prompts, 2, engine_rollout.training_sampling, "test")

    assert {sample.weight_version for group in before for sample in group.samples} == {version - 1}
    assert {sample.weight_version for group in after for sample in group.samples} == {version}
    for group in after:
        for sample in group.samples:
            reference = transformers_log_probs(policy, group.prompt.token_ids, sample.response_ids, 1.0)
            torch.testing.assert_close(torch.tensor(sample.log_probs), reference, atol=LOG_PROB_TOLERANCE, rtol=0)
    old = before[0].samples[0]
    moved = transformers_log_probs(policy, prompts[0].token_ids, old.response_ids, 1.0) - torch.tensor(old.log_probs)
    assert moved.abs().max() > 100 * LOG_PROB_TOLERANCE  # the comparison above can tell the two policies apart


def test_samples_of_other_weights_are_refused(engine_rollout, rewards, policy) -> None:
    groups = [UnfinishedGroup.new(prompt, [1, 2]) for prompt in numbered_prompts(1)]
    version = engine_rollout.weight_version + 5
    batch = RolloutBatch(batch_request(groups, engine_rollout.training_sampling, weight_version=version), 1)

    with pytest.raises(StaleWeightsError, match="a sample of prompt 100 was generated with weight version"):
        dispatch(batch, engine_rollout.engine_addresses, rewards, BatchProgress())


def test_rewards_and_text_come_with_every_sample(engine_rollout, policy) -> None:
    prompts = numbered_prompts(4)
    samples = engine_rollout.sample_step(1, lambda count: prompts[:count], unwatched)
    assert [group.prompt for group in samples.groups] == prompts and samples.others == []
    for group in samples.groups:
        assert len(group.samples) == 4
        for sample in group.samples:
            assert sample.text == " ".join(map(str, sample.response_ids))
            assert (sample.reward, sample.verdict) == (len(sample.response_ids), "ok")


def test_a_prompt_that_does_not_fit_is_an_error(engine_rollout, policy) -> None:
    too_long = replace(numbered_prompts(1)[0], token_ids=(5,) * (LONG_CONTEXT_TOKENS + 1))

    with pytest.raises(EngineError, match="refused /generate"):
        engine_rollout.generate([too_long], 1, engine_rollout.training_sampling, "test")
