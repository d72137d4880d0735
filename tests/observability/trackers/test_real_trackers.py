"""A training that is killed and continued, in the real W&B (offline), MLflow (a server here), Trackio and SwanLab.

Then the finished folder is uploaded to other destinations.
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.compare_runs import records
from tests.support.tiny_run import REPOSITORY, write_tiny_run
from tests.support.tracker_packages import tracker_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

STEPS = 4
ALL = ("wandb", "mlflow", "trackio", "swanlab")


@dataclass(frozen=True)
class Service:
    """The environment of the trackers, and MLflow's server."""

    python: Path
    url: str
    home: Path

    def run(self, *arguments: str, seconds: float = 600) -> str:
        """Output of a `python ...` command, whose standard output alone is returned."""
        return subprocess.run(
            [self.python, *arguments], env=self.environment, cwd=REPOSITORY, check=True, timeout=seconds,
            stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        places = ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "SWANLAB_CONFIG_DIR", "TRACKIO_DIR")
        offline = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "OMP_NUM_THREADS": "1"}
        return os.environ | offline | {name: str(self.home / name) for name in places} | {"PYTHONPATH": str(REPOSITORY)}

    def mlflow(self, call: str, query: dict[str, Any] | None = None) -> dict[str, Any]:
        """Answer of MLflow's REST interface; a query is posted."""
        data = None if query is None else json.dumps(query).encode()
        url, headers = f"{self.url}/api/2.0/mlflow/{call}", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Service]:
    python, home = tracker_python(), tmp_path_factory.mktemp("home")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = Service(python, f"http://127.0.0.1:{port}", home)
    store = ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "artifacts")]
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(
            [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store],
            env=service.environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until_ready(service, server)
        yield service
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def wait_until_ready(service: Service, server: subprocess.Popen) -> None:
    for _ in range(600):
        assert server.poll() is None, (service.home / "server.log").read_text()
        try:
            urllib.request.urlopen(f"{service.url}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    pytest.fail((service.home / "server.log").read_text())


@pytest.fixture(scope="module")
def run(service, tmp_path_factory) -> Path:
    """Four steps, killed after the third with a checkpoint of the second, and continued."""
    config = write_tiny_run(tmp_path_factory.mktemp("tiny"))
    folder = config.parent / "runs" / "tiny"
    trackers = f"observability.trackers=[wandb, {{name: mlflow, tracking_uri: '{service.url}'}}, trackio, swanlab]"
    settings = [f"steps={STEPS}", "checkpoint.save_every_steps=2", "phases.0.until_step=2", trackers]
    command = [str(service.python), "-m", "megatron_dsrl.cli", "train", str(config), *settings]
    with open(config.parent / "killed.log", "w") as log:
        training = subprocess.Popen(command, env=service.environment, cwd=REPOSITORY, stdout=log, stderr=log)
    deadline = time.monotonic() + 900
    checkpoint = folder / "checkpoints" / "step_000002"  # is written while the third step runs
    while not (checkpoint.exists() and len(records(folder)) >= 3):
        assert training.poll() is None and time.monotonic() < deadline, (config.parent / "killed.log").read_text()
        time.sleep(0.02)
    training.kill()
    training.wait()
    continued = subprocess.run(
        command, env=service.environment, cwd=REPOSITORY, timeout=900, capture_output=True, text=True
    )
    assert continued.returncode == 0, continued.stderr
    assert "continuing after step 2" in continued.stdout
    assert "warning: tracker" not in continued.stdout, continued.stdout
    return folder


def test_wandb_has_one_run_with_every_step_once(service, run) -> None:
    found = json.loads(service.run("-m", "tests.support.read_wandb", str(run)))
    assert len(found["ids"]) == 2 and len(set(found["ids"])) == 1
    steps = [row["step"] for row in found["history"] if "reward/mean" in row]
    assert steps == list(range(1, STEPS + 1))
    evaluations = [row for row in found["history"] if "evaluation/held-out/accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, STEPS]
    assert all(row["evaluation/held-out/responses/nrows"] == 8 for row in evaluations)
    assert found["config"]["optimizer"]["learning_rate"] == 1e-3
    assert [phase["last_step"] for phase in found["config"]["phase_schedule"]] == [2, STEPS]
    assert found["config"]["provenance"]["command"]
    part = f"wandb/offline-run-*-{found['ids'][0]}"  # `latest-run` is a link to one of them
    (table,) = run.glob(f"{part}/files/media/table/**/*_{STEPS}_*.table.json")
    assert json.loads(table.read_text())["columns"] == ["prompt", "response", "answer", "reward"]


def test_mlflow_has_one_run_with_every_step_once(service, run) -> None:
    (experiment,) = [
        each for each in service.mlflow("experiments/search", {"max_results": 10})["experiments"]
        if each["name"] == "megatron-dsrl"
    ]  # fmt: skip
    (found,) = service.mlflow("runs/search", {"experiment_ids": [experiment["experiment_id"]]})["runs"]
    assert found["info"]["status"] == "FINISHED" and found["info"]["run_name"] == "tiny"
    run_id = found["info"]["run_id"]
    history = service.mlflow(f"metrics/get-history?run_id={run_id}&metric_key=reward/mean")["metrics"]
    assert [int(point["step"]) for point in history] == list(range(1, STEPS + 1))
    times = {record["step"]: record["time"] for record in records(run)}
    assert abs(history[-1]["timestamp"] / 1000 - times[STEPS]) < 0.01  # when it was recorded, not sent
    parameters = {item["key"]: item["value"] for item in found["data"]["params"]}
    assert parameters["phases.0.name"] == "NSR-PreRL" and parameters["phase_schedule.1.first_step"] == "3"
    tables = service.mlflow(f"artifacts/list?run_id={run_id}&path=evaluation/held-out")["files"]
    assert [Path(table["path"]).name for table in tables] == [f"responses_step_{step:06d}.json" for step in (0, STEPS)]


def test_trackio_has_one_run_with_every_step_once(service, run) -> None:
    listed = json.loads(service.run("-m", "trackio.cli", "list", "runs", "--project", "megatron-dsrl", "--json"))
    (name,) = listed["runs"]
    metric = ["get", "metric", "--project", "megatron-dsrl", "--run", name, "--metric", "reward/mean", "--json"]
    values = json.loads(service.run("-m", "trackio.cli", *metric))["values"]
    assert [value["step"] for value in values] == list(range(1, STEPS + 1))


def test_swanlab_has_the_parts_of_one_run(service, run) -> None:
    """Which `swanlab sync` joins."""
    parts = sorted((run / "swanlog").glob("run-*"))
    ids = {part.name.rpartition("-")[2] for part in parts}
    assert len(parts) == 2 and len(ids) == 1
    tables = [table for part in parts for table in (part / "media" / "echarts").glob("*.json")]
    assert len(tables) == 2  # of step 0 and of the last one


def test_upload_of_a_finished_run_sends_everything_once(service, run) -> None:
    upload = ["-m", "megatron_dsrl.cli", "upload", str(run)]
    targets = [["wandb", "project=replayed"], ["mlflow", "experiment=replayed"], ["trackio", "project=replayed"]]
    for name, option in targets:
        assert f"sent {STEPS} steps and 2 evaluations" in service.run(*upload, "--to", name, option)
        assert service.run(*upload, "--to", name, option) == f"{name}: nothing new to send\n"
    assert service.run(*upload) == "".join(f"{name}: nothing new to send\n" for name in ALL), "the run itself sent it"
