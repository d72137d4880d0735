"""Runs whose phases need a critic and a reference policy; and that they resume exactly."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dsrl.checkpoint.state import Checkpoint, RunState, current_layout
from megatron_dsrl.config.load import load_config
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.run.models import build_models
from tests.support.compare_runs import assert_same_run, checkpoint_tensors, records
from tests.support.distributed import run_distributed
from tests.support.recorded_rollouts import record_random_rollouts
from tests.support.tiny_run import copy_until, dsrl, write_tiny_run

pytestmark = pytest.mark.timeout(1800)  # many starts; each is some 15 seconds on a quiet machine

STEPS = 5
WARM_UP = {
    "name": "NSR-PreRL",
    "until_step": 2,
    "space": {"name": "pre_train"},
    "advantage": {"name": "group_mean"},
    "filter": "negative",
    "coefficient": 0.01,
}
PPO = {
    "name": "PPO",
    "space": {"name": "post_train"},
    "advantage": {"name": "gae", "trace_decay": 0.95},
    "kl": {"loss_coefficient": 0.1, "reward_coefficient": 0.05},
    "optimizer": {"learning_rate": 5e-4, "gradient_clip_norm": 0.5, "reset_state": True},
}
CRITIC = {"mini_batches_per_rollout": 2, "epochs_per_rollout": 2, "optimizer": {"learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_run(folder)
    return folder


def complete_run(folder: Path, name: str, *, processes: int = 1, **sections: Any) -> Path:
    """A run of the tiny task in which the named sections are replaced."""
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {
        "name": name,
        "steps": STEPS,
        "actor": {"max_tokens_per_micro_batch": 512, "mini_batches_per_rollout": 2},
        "critic": CRITIC,
        "checkpoint": {"save_every_steps": 1, "keep_last": STEPS},
    }
    config["rollout"]["deterministic"] = True
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config | sections))
    result = dsrl("train", str(file), processes=processes, timeout_seconds=400)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / name


DUAL_SPACE = {
    "phases": [WARM_UP, PPO],
    "reference": {"refresh_at_phase_switch": True, "refresh_every_steps": 4},
}


@pytest.fixture(scope="module")
def dual_space(folder) -> Path:
    """NSR-PreRL, then PPO with KL terms against the policy of the switch, and later against that after step 4. On
    recorded samples: what is sampled does not matter here."""
    return complete_run(folder, "dual_space", **DUAL_SPACE, **on_recorded_samples(folder))


def on_recorded_samples(folder: Path) -> dict[str, Any]:
    """Sections of a run without engines."""
    recorded = record_random_rollouts(folder / "config.yaml", STEPS)
    rollout = yaml.safe_load((folder / "config.yaml").read_text())["rollout"]
    return {"rollout": rollout | {"replay_from": str(recorded)}, "evaluation": {"sets": []}}


def test_what_a_step_records_of_critic_and_reference(dual_space) -> None:
    steps = records(dual_space, "metrics.jsonl")
    for step in steps[:2]:
        assert not any(name.startswith("critic/") for name in step)
        assert step["policy/learning_rate"] == 1e-3 and "seconds/reference" not in step
    for step in steps[2:]:
        assert step["critic/loss"] > 0 and step["critic/grad_norm"] > 0 and step["critic/learning_rate"] == 1e-3
        assert step["policy/learning_rate"] == 5e-4
        passes = ("old_log_probs", "reference", "values", "critic", "train")
        assert {f"seconds/{part}" for part in passes} <= step.keys()
    assert steps[2]["critic/mean_value"] == 0.0 != steps[3]["critic/mean_value"]
    # two mini-batches: in the first one of the step after a refresh the policy is its own reference
    kl = [step["policy/reference_kl"] for step in steps[2:]]
    assert 0 < kl[0] < kl[1] and 0 < kl[2] < kl[1]


def test_the_optimizer_is_reset_at_the_switch_and_only_there(dual_space) -> None:
    """Two optimizer steps on every rollout batch; the count begins at 0 in step 3."""

    def count(step: int) -> float:
        counts = {
            tensor.item()
            for name, tensor in checkpoint_tensors(dual_space, step).items()
            if name.startswith("megatron/") and name.endswith("step") and tensor.numel() == 1
        }
        assert len(counts) == 1, counts
        return counts.pop()

    assert [count(step) for step in range(1, STEPS + 1)] == [2, 4, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
def test_resumes_exactly_at_the_switch_right_after_it_and_at_a_refresh(folder, dual_space, step) -> None:
    """At 2 the critic has not taken its first step, and reset and refresh are due; at 3 they are past."""
    reference = dual_space / "checkpoints" / f"step_{step:06d}" / "reference"
    assert reference.exists() == (step > 2), "the initial weights need no copy"
    copy_until(dual_space, step, f"resumed_{step}")
    resumed = complete_run(folder, f"resumed_{step}", **DUAL_SPACE, **on_recorded_samples(folder))
    assert_same_run(resumed, dual_space, STEPS)


def continue_into_ppo(folder: Path) -> list[bool]:
    """Whether there is a critic: in a run that ends with its first phase, and where it is given more steps."""
    phases = yaml.safe_dump([WARM_UP, PPO], default_flow_style=True, width=10_000).strip()
    run = load_config(folder / "config.yaml", [f"phases={phases}", f"steps={WARM_UP['until_step']}"])
    model, checkpoint = Path(run.model.path), folder / "ends_with_the_first_phase"
    has_critic = []
    with parallel_layout(run.parallel, seed=1):
        layout = current_layout(run.parallel)
        saved = Checkpoint(checkpoint, RunState(run.steps, "NSR-PreRL", {}, layout, {}, {}))
        saved.weights_folder.mkdir(parents=True)
        for steps in (run.steps, STEPS):
            models = build_models(run.model_copy(update={"steps": steps}), model)
            if steps == run.steps:
                write = models.actor.model.start_save(saved.weights_folder, copy=False)
                write.write()
                write.finish()
                assert models.other_parts() == {}
            models.load(saved, same_layout=True)
            has_critic.append(models.critic is not None)
    destroy_parallel()
    return has_critic


def test_a_run_that_is_given_more_steps_may_need_a_critic_that_no_checkpoint_has_yet(folder) -> None:
    assert run_distributed(continue_into_ppo, 1, folder) == [[False, True]]


@pytest.mark.slow
def test_ppo_in_two_processes_after_a_warm_up_of_the_critic(folder) -> None:
    """In the warm-up the policy stays as it is; what is saved then has an optimizer that has never stepped."""
    critic = CRITIC | {"warmup_steps": 2}
    ppo = {"phases": [{name: value for name, value in PPO.items() if name != "kl"}], "critic": critic}
    whole = complete_run(folder, "warm_up", **ppo)
    steps = records(whole, "metrics.jsonl")
    assert ["policy/grad_norm" in step for step in steps] == [False, False, True, True, True]
    assert all(step["critic/grad_norm"] > 0 for step in steps)
    copy_until(whole, 1, "warm_up_resumed")
    assert_same_run(complete_run(folder, "warm_up_resumed", **ppo), whole, STEPS)

    replay = {**ppo, "evaluation": {"sets": []}}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    replay["rollout"] = config["rollout"] | {"deterministic": True, "replay_from": str(whole)}
    for name, parallel in {
        "tensor": {"tensor_parallel_size": 2, "sequence_parallel": True},
        "pipeline": {"pipeline_parallel_size": 2},
        "data": {"distributed_optimizer": True},
    }.items():
        other = records(complete_run(folder, name, processes=2, parallel=parallel, **replay), "metrics.jsonl")
        for one, two in zip(steps, other, strict=True):
            for metric in [metric for metric in one if metric.startswith("critic/") or metric == "policy/grad_norm"]:
                assert two[metric] == pytest.approx(one[metric], rel=1e-5, abs=1e-7), (name, one["step"], metric)
