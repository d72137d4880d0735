"""A run that is interrupted and started again ends bit for bit as an uninterrupted one, for every kind of interrupt.

Random faults at random moments: tests/tools/test_fault_soak.py.
"""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dsrl.observability.records import read_starts
from megatron_dsrl.provenance.differences import steps_of_starts
from megatron_dsrl.run.preemption import PREEMPTED_STATUS
from tests.support.compare_runs import assert_same_run, records
from tests.support.disk import fill_disk, small_disk
from tests.support.running import RunningTraining, running_training
from tests.support.tiny_run import copy_until, dsrl, processes_left_behind, write_tiny_run

pytestmark = pytest.mark.timeout(1800)  # many starts; each is some 15 seconds on a quiet machine

STEPS = 6
TORCHRUN_FAILED = 1
"""Exit status of torchrun for any failure of its processes."""
OPTIONS = (
    f"steps={STEPS}",
    "phases.0.until_step=2",
    "rollout.deterministic=true",
    "checkpoint.save_every_steps=1",
    f"checkpoint.keep_last={STEPS}",
)

OFFLOAD = "actor.offload={gradients: true, optimizer: true, parameters: true}"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(config) -> Path:
    """All steps in one go, both phases, a checkpoint after every one."""
    return complete_run(config, "undisturbed")


def complete_run(config: Path, name: str, *options: str, processes: int = 1) -> Path:
    result = dsrl("train", str(config), f"name={name}", *OPTIONS, *options, processes=processes, timeout_seconds=400)
    assert result.returncode == 0, result.stderr
    assert processes_left_behind() == []
    return config.parent / "runs" / name


def cut_after(run: Path, step: int, name: str) -> Path:
    """A copy of a run as if it had been killed while it wrote the checkpoint after `step`."""
    copy = copy_until(run, step, name)
    (copy / "checkpoints" / f".partial_step_{step + 1:06d}" / "megatron").mkdir(parents=True)
    return copy


def newest_checkpoint(run: Path) -> int:
    """Step of the newest one; 0 before the first one."""
    folders = (run / "checkpoints").glob("step_*")
    return max((int(folder.name.removeprefix("step_")) for folder in folders), default=0)


def remove_rollouts(run: Path, step: int) -> None:
    """So that they tell when the step is sampled again."""
    (run / "rollouts" / f"step_{step:06d}.jsonl").unlink(missing_ok=True)


def test_stops_kills_and_a_dead_engine_change_nothing(config, undisturbed) -> None:
    """SIGTERM while sampling, SIGUSR1 while updating, the death of an engine during an update and while it samples, and
    `kill -9` of the trainer: one run, whose trainer is in host memory while the engine samples."""
    run = config.parent / "runs" / "disturbed"
    arguments = (str(config), "name=disturbed", *OPTIONS, OFFLOAD)

    with running_training(*arguments, run=run) as training:
        training.wait_until(lambda: training.has_checkpoint(1))
        training.process.send_signal(signal.SIGTERM)
        assert training.ended() == PREEMPTED_STATUS, training.output
    stopped_after = newest_checkpoint(run)
    assert f"stopped after step {stopped_after}, with its state saved" in training.output

    def disturb_the_next_update(disturb: Callable[[RunningTraining], None]) -> int:
        step = newest_checkpoint(run) + 1
        remove_rollouts(run, step)
        with running_training(*arguments, run=run) as training:
            training.wait_until(lambda: training.has_rollouts(step))
            disturb(training)
            return training.ended()

    status = disturb_the_next_update(lambda training: training.process.send_signal(signal.SIGUSR1))
    assert status == PREEMPTED_STATUS
    assert newest_checkpoint(run) > stopped_after, "a running update comes to its end"

    def kill_engine_and_later_trainer(training: RunningTraining) -> None:
        step = newest_checkpoint(run) + 1
        training.engine_processes()[0].kill()
        training.wait_until(lambda: training.has_checkpoint(step))  # sampling for the next step has begun
        training.engine_processes()[0].kill()
        training.wait_until(lambda: training.has_checkpoint(step + 1))
        training.process.kill()

    assert disturb_the_next_update(kill_engine_and_later_trainer) == -signal.SIGKILL
    assert "(restart 2 of engine.max_restarts" in (run.parent / "disturbed.output").read_text()

    complete_run(config, "disturbed")
    assert_same_run(run, undisturbed, STEPS)
    spans = steps_of_starts(read_starts(run), STEPS)
    steps = [step for span in spans if span for step in range(span[0], span[1] + 1)]
    assert len(spans) == 4 and steps == list(range(1, STEPS + 1)), "every step has come from one of the four starts"


@pytest.mark.slow
def test_a_second_start_in_the_run_folder_is_refused_and_changes_nothing(config, undisturbed) -> None:
    """On two ranks, while the first one trains; it then continues as if nothing had happened."""
    run = config.parent / "runs" / "twice"
    with running_training(str(config), "name=twice", *OPTIONS, run=run) as training:
        training.wait_until(lambda: training.has_checkpoint(1))
        training.process.send_signal(signal.SIGSTOP)
        second = dsrl("train", str(config), "name=twice", *OPTIONS, processes=2)
        training.process.send_signal(signal.SIGCONT)
        assert training.ended() == 0, training.output
    assert f"dsrl: {run} is in use by process {training.process.pid} on " in second.stderr
    assert f"dsrl: rank 1: {run} is in use by process" in second.stderr
    assert_same_run(run, undisturbed, STEPS)


@pytest.mark.slow
def test_a_disk_without_room_for_the_record_of_a_step_ends_all_ranks_with_the_message(config, tmp_path) -> None:
    disk = tmp_path / "disk"
    run = disk / "full"
    only_records = "observability={save_rollouts: false, trace: false, tensorboard: false}"
    settings = (f"output_dir={disk}", "name=full", "steps=50", "evaluation.sets=[]", only_records)
    with small_disk(disk):
        with running_training(str(config), *settings, run=tmp_path / "full", processes=2) as training:
            metrics = run / "metrics.jsonl"
            training.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
            fill_disk(disk)
            assert training.ended() == TORCHRUN_FAILED
        message = f"{metrics} could not be written (0 MiB are free there): [Errno 28] No space left on device"
        assert f"dsrl: {message}" in training.output and f"dsrl: rank 1: {message}" in training.output


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.tensor_parallel_size=2", "parallel.distributed_optimizer=true"])
def test_two_processes_resume_exactly(config, layout) -> None:
    """One model over two processes, and two models side by side; an engine for each process."""
    name = layout.split("=")[0].split(".")[1]
    whole = complete_run(config, name, layout, processes=2)
    cut_after(whole, 2, f"{name} resumed")
    resumed = complete_run(config, f"{name} resumed", layout, processes=2)
    assert_same_run(resumed, whole, STEPS)


@pytest.mark.slow
def test_two_processes_that_are_asked_to_stop_continue_exactly(config, undisturbed) -> None:
    """SIGTERM to torchrun, then SIGUSR1 to one rank that is not the controller. On saved samples, without engines."""
    options = ("parallel.tensor_parallel_size=2", f"rollout.replay_from={undisturbed}", "evaluation.sets=[]")
    whole = complete_run(config, "replayed", *options, processes=2)
    run = config.parent / "runs" / "replayed, stopped"
    arguments = (str(config), f"name={run.name}", *OPTIONS, *options)

    with running_training(*arguments, run=run, processes=2) as training:
        training.wait_until(lambda: training.has_checkpoint(1))
        training.process.send_signal(signal.SIGTERM)
        assert training.ended() == TORCHRUN_FAILED, training.output
    stopped_after = newest_checkpoint(run)
    assert 1 <= stopped_after < STEPS
    remove_rollouts(run, stopped_after + 1)

    with running_training(*arguments, run=run, processes=2) as training:
        training.wait_until(lambda: training.has_rollouts(stopped_after + 1))
        training.ranks()[1].send_signal(signal.SIGUSR1)
        assert training.ended() == TORCHRUN_FAILED, training.output
        assert f"exitcode  : {PREEMPTED_STATUS}" in training.output
    assert stopped_after < newest_checkpoint(run)

    complete_run(config, run.name, *options, processes=2)
    assert_same_run(run, whole, STEPS)


@pytest.mark.slow
def test_another_layout_continues_with_the_same_loss(config, undisturbed) -> None:
    """On the same samples: with other matrix shapes log-probs differ by rounding, now and then a token with them."""
    resumed = cut_after(undisturbed, 2, "two processes")
    layout = ("parallel.tensor_parallel_size=2", f"rollout.replay_from={undisturbed}", "evaluation.sets=[]")
    complete_run(config, resumed.name, *layout, processes=2)
    for one, other in zip(records(undisturbed, "metrics.jsonl"), records(resumed, "metrics.jsonl"), strict=True):
        for metric in ("policy/loss", "policy/grad_norm"):
            assert other[metric] == pytest.approx(one[metric], rel=1e-5), (one["step"], metric)
