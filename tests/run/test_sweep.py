"""`dsrl sweep`: what its file may say, and a real sweep that is started twice."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.run.sweep import load_sweep, run_sweep, runs_of
from tests.support.tiny_run import dsrl, write_tiny_run
from tests.support.waiting import wait_until


def write_sweep(folder: Path, **changes) -> Path:
    sweep = {
        "output_dir": str(folder / "sweep"),
        "seeds": [1, 2],
        "baseline": "GRPO",
        "overrides": ["steps=2"],
        "runs": {
            "GRPO": {"config": "config.yaml", "overrides": ["phases.0.coefficient=1.0"]},
            "DSRL": {"config": "config.yaml"},
        },
    } | changes
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return file


def test_every_method_runs_with_every_seed_round_by_round(tmp_path) -> None:
    sweep = load_sweep(write_sweep(tmp_path))
    runs = runs_of(sweep, tmp_path)
    assert [run.folder.name for run in runs] == ["GRPO_seed1", "DSRL_seed1", "GRPO_seed2", "DSRL_seed2"]
    assert runs[2].arguments == [
        str(tmp_path / "config.yaml"),
        "steps=2",
        "phases.0.coefficient=1.0",
        f"output_dir={tmp_path}/sweep",
        "name=GRPO_seed2",
        "seed=2",
    ]


def test_a_run_of_several_files_trains_on_all_of_them(tmp_path) -> None:
    file = write_sweep(tmp_path, runs={"GRPO": {"config": ["size.yaml", "method.yaml"]}})
    run = runs_of(load_sweep(file), tmp_path)[0]
    assert run.arguments[:3] == [str(tmp_path / "size.yaml"), str(tmp_path / "method.yaml"), "steps=2"]
    with pytest.raises(UserError, match=r"runs\.GRPO\.config: "):
        load_sweep(write_sweep(tmp_path, runs={"GRPO": {"config": []}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds: is empty, got "),
        ({"sedes": [1]}, r"1 problem in the sweep\n  sedes: unknown key; did you mean seeds\? \(.*sweep.yaml:\d+\)"),
        ({"runs": {"A": {"confg": "a.yaml"}}}, r"runs\.A\.confg: unknown key; did you mean config\?"),
        ({"baseline": "PPO"}, "`PPO` is not one of the runs GRPO, DSRL"),
        ({"seeds": [2, 1, 2]}, "seeds: 2 is named twice; remove one"),
        (
            {"runs": {"GRPO": {"config": "a.yaml"}, "a b": {"config": "a.yaml"}, "a_b": {"config": "b.yaml"}}},
            "runs: `a b` and `a_b` have the same folder; rename one",
        ),
    ],
)
def test_a_wrong_sweep_is_refused_with_the_field(tmp_path, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        load_sweep(write_sweep(tmp_path, **changes))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=nowhere"], r"^runs\.DSRL: model\.path: no such folder: nowhere"),
        (["evaluation.sets=[]"], r"^runs\.DSRL: evaluation\.sets: is empty, but a sweep compares evaluations"),
    ],
)
def test_nothing_starts_if_one_of_the_runs_cannot(tmp_path, overrides, message) -> None:
    config = write_tiny_run(tmp_path)
    runs = {"GRPO": {"config": config.name}, "DSRL": {"config": config.name, "overrides": overrides}}
    with pytest.raises(UserError, match=message):
        run_sweep(runs_of(load_sweep(write_sweep(tmp_path, runs=runs)), tmp_path), 1)
    assert not (tmp_path / "sweep").exists()


def replace_training(folder: Path, monkeypatch, script: str) -> None:
    """Let the runs of a sweep execute a shell script in `folder`."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.chdir(folder)


def test_a_failed_run_is_named_with_its_reason_and_the_others_continue(tmp_path, monkeypatch, capsys) -> None:
    write_tiny_run(tmp_path)
    replace_training(tmp_path, monkeypatch, "echo 'dsrl: the disk is full'; echo 'tail of the log'; exit 1\n")
    runs = runs_of(load_sweep(write_sweep(tmp_path, seeds=[1])), tmp_path)
    assert run_sweep(runs, 1) == runs
    assert capsys.readouterr().out.splitlines() == [
        "0 of 2 runs are finished",
        f"GRPO, seed 1: failed: the disk is full; see {tmp_path}/sweep/GRPO_seed1.log",
        f"DSRL, seed 1: failed: the disk is full; see {tmp_path}/sweep/DSRL_seed1.log",
    ]

    # the reason is not that of an earlier start, which the log still has
    replace_training(tmp_path, monkeypatch, "kill -9 $$\n")
    assert run_sweep(runs, 1) == runs
    assert "DSRL, seed 1: failed: status -9; see" in capsys.readouterr().out


@pytest.mark.parametrize("status", [75, 143])  # of a run that has saved its state, and of one that was still starting
def test_an_interrupted_sweep_lets_its_runs_save_their_state(tmp_path, monkeypatch, capsys, status) -> None:
    write_tiny_run(tmp_path)
    replace_training(
        tmp_path,
        monkeypatch,
        f"trap 'exit {status}' TERM\necho \"$DSRL_LAUNCHER\" >> started\nwhile :; do sleep 0.05; done\n",
    )

    def interrupt() -> None:
        for _ in range(600):
            if (tmp_path / "started").exists():
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    runs = runs_of(load_sweep(write_sweep(tmp_path)), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(runs, 1)
    assert capsys.readouterr().out.splitlines() == [
        "0 of 4 runs are finished",
        "GRPO, seed 1: stopped; the same command continues it",
    ]
    # runs of a sweep that is killed end with it
    assert (tmp_path / "started").read_text() == f"{os.getpid()}\n"


def test_an_interrupt_while_the_pool_starts_its_thread_waits_for_the_run_too(tmp_path, monkeypatch, capsys) -> None:
    write_tiny_run(tmp_path)
    replace_training(
        tmp_path, monkeypatch, "trap 'sleep 0.3; exit 75' TERM\ntouch started\nwhile :; do sleep 0.05; done\n"
    )
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        wait_until((tmp_path / "started").exists, 30)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(runs_of(load_sweep(write_sweep(tmp_path)), tmp_path), 1)
    assert "GRPO, seed 1: stopped" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_trains_compares_and_does_nothing_the_second_time(tmp_path) -> None:
    write_tiny_run(tmp_path)
    sweep = write_sweep(tmp_path, seeds=[1])
    first = dsrl("sweep", str(sweep))
    assert first.returncode == 0, first.stderr
    table = (tmp_path / "sweep" / "comparison.md").read_text()
    assert "| GRPO | 1 |" in table and "| DSRL | 1 |" in table and table in first.stdout
    again = dsrl("sweep", str(sweep))
    assert again.stdout.startswith("2 of 2 runs are finished") and "of training" not in again.stdout
