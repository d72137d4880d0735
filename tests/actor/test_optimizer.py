"""What a phase may change about the optimizer, seen through the steps that it takes."""

from pathlib import Path

import numpy as np
import pytest

from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.config.actor import ActorConfig, OptimizerConfig
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.actor.test_actor import GRPO, objective_of, run_config
from tests.support.actors import flat, weights_of
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3

RATE, CLIP = 2e-3, 0.01
FIRST = OptimizerConfig(learning_rate=1e-2, gradient_clip_norm=0.5, warmup_steps=3, eps=1e-3)
SECOND = FIRST.model_copy(update={"learning_rate": RATE, "gradient_clip_norm": CLIP})


def steps_of_actors(folder: Path) -> dict[str, tuple[list[dict], dict[str, np.ndarray]]]:
    """Metrics and final weights of actors that come to the second settings in different ways."""

    def outcome(optimizer: OptimizerConfig, steps: list[str]) -> tuple[list[dict], dict[str, np.ndarray]]:
        config = run_config(folder, ParallelConfig(), ActorConfig(max_tokens_per_micro_batch=10_000))
        with parallel_layout(ParallelConfig(), seed=1):
            actor = build_actor(config.model_copy(update={"optimizer": optimizer}), folder)
            updates = []
            for step in steps:
                if step == "configure":
                    actor.model.configure_optimizer(RATE, CLIP)
                elif step == "reset":
                    actor.model.reset_optimizer()
                else:
                    updates.append(flat(actor.update([objective_of(GRPO)])))
            return updates, weights_of(actor)

    results = {
        "built": outcome(SECOND, ["step", "step"]),
        "configured": outcome(FIRST, ["configure", "step", "step"]),
        "configured later": outcome(FIRST, ["step", "configure", "step"]),
        "reset": outcome(SECOND, ["reset", "step", "step"]),
        "reset later": outcome(SECOND, ["step", "reset", "step"]),
    }
    destroy_parallel()
    return results


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[list[dict], dict[str, np.ndarray]]]:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_qwen3(folder, tied=True, vocab_size=127)
    return run_distributed(steps_of_actors, 1, folder)[0]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(weight, other[name]) for name, weight in one.items())


def test_other_settings_are_those_of_an_optimizer_that_was_built_with_them(outcomes) -> None:
    assert outcomes["configured"][0] == outcomes["built"][0]
    assert same(outcomes["configured"][1], outcomes["built"][1])


def test_warm_up_continues_when_settings_change(outcomes) -> None:
    rates = [update["learning_rate"] for update in outcomes["configured later"][0]]
    assert rates == pytest.approx([1e-2 / 4, RATE * 2 / 4])


def test_a_reset_before_the_first_step_changes_nothing_and_later_on_it_forgets(outcomes) -> None:
    assert same(outcomes["reset"][1], outcomes["built"][1])
    assert outcomes["reset later"][0] == outcomes["built"][0], "the gradients of the second step are the same"
    assert not same(outcomes["reset later"][1], outcomes["built"][1])
