"""A run that is interrupted and started again ends as the run that never was: bit for bit, whatever interrupted it."""

import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_dsrl.preemption import PREEMPTED_STATUS
from tests.support.compare_runs import assert_same_run, records
from tests.support.running import running_training
from tests.support.tiny_run import dsrl, processes_left_behind, write_tiny_run

pytestmark = pytest.mark.timeout(900)  # many starts; each is some 15 seconds on a quiet machine

STEPS = 4
OPTIONS = (
    f"steps={STEPS}",
    "phases.0.until_step=2",
    "rollout.deterministic=true",
    "checkpoint.save_every_steps=1",
    f"checkpoint.keep_last={STEPS}",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(config) -> Path:
    """All steps in one go, both phases, a checkpoint after every one."""
    return complete_run(config, "undisturbed")


def complete_run(config: Path, name: str, *options: str, processes: int = 1) -> Path:
    result = dsrl("train", str(config), f"name={name}", *OPTIONS, *options, processes=processes)
    assert result.returncode == 0, result.stderr
    assert processes_left_behind() == []
    return config.parent / "runs" / name


def cut_after(run: Path, step: int, name: str) -> Path:
    """A copy of a run as if it had been killed while it wrote the checkpoint after `step`."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(copy / "checkpoints" / f"step_{later:06d}")
    (copy / "checkpoints" / f".partial_step_{step + 1:06d}" / "megatron").mkdir(parents=True)
    shutil.rmtree(copy / "hf")
    return copy


def test_preemption_and_kill_at_three_moments_change_nothing(config, undisturbed):
    """SIGTERM while sampling, SIGUSR1 while updating, then the whole machine, so to speak."""
    run = config.parent / "runs" / "disturbed"
    arguments = (str(config), "name=disturbed", *OPTIONS)

    with running_training(*arguments, run=run) as training:
        training.wait_until(lambda: training.is_sampling(2))
        training.process.send_signal(signal.SIGTERM)
        assert training.ended() == PREEMPTED_STATUS, training.output
    first_start = newest_checkpoint(run)
    assert first_start >= 1

    with running_training(*arguments, run=run) as training:
        training.wait_until(lambda: training.is_updating(first_start + 1))
        training.process.send_signal(signal.SIGUSR1)
        assert training.ended() == PREEMPTED_STATUS, training.output
    second_start = newest_checkpoint(run)
    assert second_start == first_start + 1, "a running update comes to its end, and is saved"

    with running_training(*arguments, run=run) as training:
        training.wait_until(lambda: training.is_updating(second_start + 1))
        training.process.kill()
        assert training.ended() == -signal.SIGKILL

    complete_run(config, "disturbed")
    assert_same_run(run, undisturbed, STEPS)


def newest_checkpoint(run: Path) -> int:
    return max(int(folder.name.removeprefix("step_")) for folder in (run / "checkpoints").glob("step_*"))


def test_a_dead_engine_ends_the_run_with_one_message_and_the_next_start_continues(config, undisturbed):
    run = cut_after(undisturbed, 2, "dead engine")
    with running_training(str(config), "name=dead engine", *OPTIONS, run=run) as training:
        training.wait_until(lambda: training.is_sampling(3))
        random.choice(training.engine_processes()).kill()
        status = training.ended()
    if status != 0:  # otherwise the run was quicker than the signal
        assert "engine" in training.output and training.output.count("Traceback") <= 1

    complete_run(config, "dead engine")
    assert_same_run(run, undisturbed, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_soak_kill_9_of_trainer_or_engine_at_random_moments(config, undisturbed, seed):
    """Kills until the run comes through; each start is given more time, so that it must."""
    chance = random.Random(seed)
    name = f"soak-{seed}"
    run = config.parent / "runs" / name
    for patience in range(1, 8):
        with running_training(str(config), f"name={name}", *OPTIONS, run=run) as training:
            deadline = time.monotonic() + chance.uniform(0, 8 * patience)
            training.wait_until(lambda: time.monotonic() > deadline)  # noqa: B023
            victims = [psutil.Process(training.process.pid), *training.engine_processes()]
            chance.choice(victims if chance.random() < 0.5 else victims[:1]).kill()
            status = training.ended()
        if status == 0:
            break
    complete_run(config, name)
    assert_same_run(run, undisturbed, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.tensor_parallel_size=2", "parallel.distributed_optimizer=true"])
def test_two_processes_resume_exactly(config, layout):
    """One model over two processes, and two models side by side; an engine for each process."""
    name = layout.split("=")[0].split(".")[1]
    whole = complete_run(config, name, layout, processes=2)
    cut_after(whole, 2, f"{name} resumed")
    resumed = complete_run(config, f"{name} resumed", layout, processes=2)
    assert_same_run(resumed, whole, STEPS)


@pytest.mark.slow
def test_another_layout_continues_with_the_same_loss(config, undisturbed):
    """On the same samples: the log-probs of other matrix shapes differ by rounding, and with them now and then a token."""
    resumed = cut_after(undisturbed, 2, "two processes")
    layout = ("parallel.tensor_parallel_size=2", f"rollout.replay_from={undisturbed}", "evaluation.sets=[]")
    complete_run(config, resumed.name, *layout, processes=2)
    for one, other in zip(records(undisturbed, "metrics.jsonl"), records(resumed, "metrics.jsonl"), strict=True):
        for metric in ("policy/loss", "policy/grad_norm"):
            assert other[metric] == pytest.approx(one[metric], rel=1e-5), (one["step"], metric)
