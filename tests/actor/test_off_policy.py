"""Several epochs and mini-batches per rollout against a plain implementation in Transformers and torch.optim.

The reference below is one process, one sequence at a time, with every formula written out where it is used: PPO's loop
as a textbook has it. Weights must be equal after two epochs of two mini-batches, where the last three steps are
off-policy.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM

from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.advantages import GroupMean, GroupStandardised
from megatron_dsrl.algorithms.aggregations import SequenceMean, TokenSum
from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.filters import Negative
from megatron_dsrl.algorithms.importance import Truncated
from megatron_dsrl.algorithms.losses import CISPO, GSPO, DualClip
from megatron_dsrl.algorithms.objective import build_objectives
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain
from megatron_dsrl.config.actor import ActorConfig, OptimizerConfig
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.phase import AdditionalObjectiveConfig, KLConfig, PhaseConfig
from megatron_dsrl.model.parallel import parallel_layout
from tests.actor.test_actor import BOS, TEMPERATURE, run_config
from tests.support.actors import flat
from tests.support.plain_torch import adamw

pytestmark = pytest.mark.usefixtures("torch_distributed")

MINI_BATCHES, EPOCHS = 2, 2
LENGTH_LIMIT = 20
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, eps=1e-2, gradient_clip_norm=0.5)
POST_TRAIN, PRE_TRAIN = PostTrain(), PreTrain()


@dataclass(frozen=True)
class Sequence:
    """What the reference trains on."""

    context: tuple[int, ...]
    response: tuple[int, ...]
    advantage: float
    engine: Tensor
    reference: Tensor
    old: Tensor | None = None


TokenLoss = Callable[[Tensor, Tensor, Sequence], Tensor]
"""Log-probs and entropy of a sequence's tokens -> their losses."""


@dataclass(frozen=True)
class Term:
    """One term of the reference's loss."""

    sequences: list[Sequence]
    loss: TokenLoss
    weight: Callable[[list[int], int], float]
    """All lengths of the step and one of them -> weight of its tokens."""
    coefficient: float = 1.0


def token_mean(lengths: list[int], length: int) -> float:
    return 1 / sum(lengths)


def sequence_mean(lengths: list[int], length: int) -> float:
    return 1 / len(lengths) / length


def token_sum(lengths: list[int], length: int) -> float:
    return 1 / len(lengths) / LENGTH_LIMIT


def ppo(lp: Tensor, entropy: Tensor, s: Sequence) -> Tensor:
    ratio = (lp - s.old).exp()
    return -torch.minimum(ratio * s.advantage, ratio.clamp(0.9, 1.1) * s.advantage)


def gspo(lp: Tensor, entropy: Tensor, s: Sequence) -> Tensor:
    ratio = (lp - s.old).mean().exp()
    return -torch.minimum(ratio * s.advantage, ratio.clamp(0.98, 1.03) * s.advantage).expand(len(lp))


def cispo(lp: Tensor, entropy: Tensor, s: Sequence) -> Tensor:
    return -(lp - s.old).exp().clamp(max=1.1).detach() * s.advantage * lp


def everything(lp: Tensor, entropy: Tensor, s: Sequence) -> Tensor:
    """PPO with TIS, plus 0.1 k3 and minus 0.05 of the entropy."""
    correction = (s.old - s.engine).exp().clamp(max=1.2)
    difference = s.reference - lp
    return ppo(lp, entropy, s) * correction + 0.1 * (difference.exp() - 1 - difference) - 0.05 * entropy


def policy_gradient(lp: Tensor, entropy: Tensor, s: Sequence) -> Tensor:
    """PPO with a clip so wide that it does not matter here."""
    return -(lp - s.old).exp() * s.advantage


def phase(**options: object) -> PhaseConfig:
    options = {"advantage": GroupStandardised(), "loss": DualClip(clip_low=0.1, clip_high=0.1)} | options
    return PhaseConfig(name="test", space=POST_TRAIN, **options)


METHODS: dict[str, tuple[PhaseConfig, TokenLoss, Callable[[list[int], int], float]]] = {
    "PPO's clip": (phase(), ppo, token_mean),
    "Dr.GRPO's sum": (phase(aggregation=TokenSum()), ppo, token_sum),
    "GSPO": (phase(loss=GSPO(clip_low=0.02, clip_high=0.03), aggregation=SequenceMean()), gspo, sequence_mean),
    "CISPO": (phase(loss=CISPO(clip_high=0.1)), cispo, token_mean),
    "with TIS, KL and entropy": (
        phase(importance_correction=Truncated(cap=1.2), kl=KLConfig(loss_coefficient=0.1), entropy_coefficient=0.05),
        everything,
        token_mean,
    ),
}
NSR_PRERL = AdditionalObjectiveConfig(
    name="nsr_prerl",
    space=PRE_TRAIN,
    advantage=GroupMean(),
    filter=Negative(),
    coefficient=0.3,
    loss=DualClip(clip_low=0.99, clip_high=100.0, dual_clip=None),
)


def responses() -> list[Response]:
    """4 groups of 4 with mixed rewards; the engine's log-probs are those of another policy."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(127, (length,), generator=generator).tolist())

    batch = []
    for group in range(4):
        prompt = tokens(4 + group)
        for sample in range(4):
            response = tokens(3 + (5 * sample + group) % 9)
            engine = (-4.8 + 0.3 * torch.randn(len(response), generator=generator)).tolist()
            batch.append(Response(prompt, response, engine, float(sample < group), group))
    return batch


def reference_log_probs(response: Response) -> Tensor:
    """Log-probs of a made-up reference policy."""
    return torch.tensor(response.engine_log_probs) - 0.1 * torch.arange(len(response.response_ids))


def sequences(pre_train: bool) -> list[Sequence]:
    """The samples with advantages by hand: standardised over the group, or centred and only the negative ones."""
    chosen = []
    batch = responses()
    for response in batch:
        rewards = torch.tensor([r.reward for r in batch if r.group == response.group])
        advantage = response.reward - rewards.mean().item()
        if pre_train and not advantage < 0:
            continue
        advantage = advantage if pre_train else advantage / (rewards.std().item() + 1e-6)
        context = tuple(BOS) if pre_train else tuple(response.prompt_ids)
        engine = torch.tensor(response.engine_log_probs)
        chosen.append(Sequence(context, tuple(response.response_ids), advantage, engine, reference_log_probs(response)))
    return chosen


def score(model: Qwen3ForCausalLM, s: Sequence) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response's tokens."""
    logits = model(torch.tensor([s.context + s.response])).logits[0, len(s.context) - 1 : -1]
    log_softmax = F.log_softmax(logits / TEMPERATURE, -1)
    log_probs = log_softmax.gather(1, torch.tensor(s.response)[:, None])[:, 0]
    return log_probs, -(log_softmax.exp() * log_softmax).sum(-1)


def reference_update(model: Qwen3ForCausalLM, terms: list[Term]) -> list[float]:
    """Train the model in place; the loss of every optimizer step."""
    optimizer = adamw(model, OPTIMIZER)
    with torch.no_grad():
        terms = [replace(t, sequences=[replace(s, old=score(model, s)[0]) for s in t.sequences]) for t in terms]
    losses = []
    for _ in range(EPOCHS):
        for part in range(MINI_BATCHES):
            loss = torch.zeros(())
            for term in terms:
                count = len(term.sequences)
                members = term.sequences[count * part // MINI_BATCHES : count * (part + 1) // MINI_BATCHES]
                lengths = [len(s.response) for s in members]
                for s in members:
                    weight = term.coefficient * term.weight(lengths, len(s.response))
                    loss = loss + weight * term.loss(*score(model, s), s).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.gradient_clip_norm)
            optimizer.step()
            losses.append(loss.item())
    return losses


def check(model, config: PhaseConfig, terms: list[Term]) -> dict[str, float]:
    """Train with the actor and with the reference; the actor's metrics."""
    folder, initial = model
    expected = copy.deepcopy(initial)
    losses = reference_update(expected, terms)

    experiences = [
        replace(
            build_experience(responses(), objective.space, BOS),
            reference_log_probs=tuple(map(reference_log_probs, responses())),
        )
        for objective in config.objectives.values()
    ]
    parallel, actor_config = ParallelConfig(), ActorConfig(max_tokens_per_micro_batch=60)
    run = run_config(folder, parallel, actor_config).model_copy(update={"optimizer": OPTIMIZER})
    with parallel_layout(parallel, seed=1):
        actor = build_actor(run, folder)
        objectives = [actor.with_old_log_probs(each) for each in build_objectives(config, experiences, LENGTH_LIMIT)]
        update = actor.update(objectives, MINI_BATCHES, EPOCHS)
        weights = {
            name: w.numpy().copy() for bucket in actor.model.hf_weights(bucket_bytes=10_000) for name, w in bucket
        }

    assert update.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4, abs=1e-6)
    moved = 0.0
    for name, weight in weights.items():
        # two units in the last place of a norm weight near 1; four steps move weights by up to 1e-2
        np.testing.assert_allclose(weight, expected.state_dict()[name], rtol=0, atol=2.5e-7, err_msg=name)
        moved = max(moved, (expected.state_dict()[name] - initial.state_dict()[name]).abs().max().item())
    assert moved > 1e-3
    return flat(update)


@pytest.mark.parametrize("name", METHODS)
def test_two_epochs_of_two_mini_batches_equal_the_reference(model, name) -> None:
    config, loss, weight = METHODS[name]
    metrics = check(model, config, [Term(sequences(pre_train=False), loss, weight)])
    assert 0 < metrics["policy/clip_fraction"] < 1, "the steps must be large enough for the clip to matter"


def test_two_objectives_in_two_spaces_equal_the_reference(model) -> None:
    terms = [
        Term(sequences(pre_train=False), ppo, token_mean),
        Term(sequences(pre_train=True), policy_gradient, token_mean, coefficient=0.3),
    ]
    metrics = check(model, phase(additional_objectives=[NSR_PRERL]), terms)
    assert metrics["nsr_prerl/kept_samples"] == EPOCHS * len(terms[1].sequences)
