"""MLflow: a tracking server, or a database or folder on this machine."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from time import time as clock
from typing import Any, ClassVar, Literal

from megatron_dsrl.config.choices import TRACKERS
from megatron_dsrl.observability.trackers.base import RESPONSE_COLUMNS, Status, TrackedRun, TrackerOptions, TrackerRun

DEFAULT_EXPERIMENT = "megatron-dsrl"
ID_TAG = "dsrl.run_id"
STATUS_OF: dict[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
PARAMETER_CHARACTERS = 6000
ITEMS_PER_CALL = 100
"""Parameters or tags in one request."""
TAG_CHARACTERS = 5000


@TRACKERS.register
class MlflowTracker(TrackerOptions):
    """Where MLflow keeps its runs. Credentials come from MLflow's environment variables."""

    name: Literal["mlflow"] = "mlflow"
    package: ClassVar[str] = "mlflow"
    requirement: ClassVar[str] = "mlflow-skinny"

    tracking_uri: str | None = None
    """Server or store, such as http://127.0.0.1:5000; null: MLFLOW_TRACKING_URI, else MLflow's default store in the
    current folder, which needs the whole `mlflow` package."""

    experiment: str | None = None
    """null: MLFLOW_EXPERIMENT_NAME, else megatron-dsrl."""

    def open(self, run: TrackedRun) -> TrackerRun:
        """Runs are identified by the tag `dsrl.run_id`, since MLflow chooses the ids of its runs itself."""
        # The attempts are repeated here; MLflow's own retries take minutes without reporting a failure.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient

        client = MlflowClient(self.tracking_uri)
        experiment_id = _experiment(client, self._experiment())
        known = client.search_runs([experiment_id], f"tags.`{ID_TAG}` = '{run.id}'", max_results=1)
        opened = known[0] if known else client.create_run(experiment_id, run_name=run.name, tags={ID_TAG: run.id})
        run_id = opened.info.run_id
        client.update_run(run_id, status="RUNNING")
        _log_parameters(client, run_id, run.config, opened.data.params)
        return MlflowRun(client, run_id, _url(self.tracking_uri, experiment_id, run_id))

    def destination(self) -> dict[str, Any]:
        """Store and experiment."""
        return {"tracking_uri": self.tracking_uri or _default_uri(), "experiment": self._experiment()}

    def _experiment(self) -> str:
        return self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


class MlflowRun(TrackerRun):
    """An MLflow run. Responses are tables under its artifacts."""

    def __init__(self, client: Any, run_id: str, url: str | None) -> None:
        self._client = client
        self._run_id = run_id
        self.url = url

    def log(self, step: int, metrics: Mapping[str, float], time: float | None) -> None:
        from mlflow.entities import Metric

        milliseconds = int(1000 * (clock() if time is None else time))
        values = [Metric(allowed_name(key), value, milliseconds, step) for key, value in metrics.items()]
        self._client.log_batch(self._run_id, values)

    def log_responses(self, step: int, evaluation_set: str, rows: Sequence[Sequence[Any]]) -> None:
        columns = ("step", *RESPONSE_COLUMNS)
        table = {column: [(step, *row)[i] for row in rows] for i, column in enumerate(columns)}
        file = f"evaluation/{allowed_name(evaluation_set).replace('/', '_')}/responses_step_{step:06d}.json"
        self._client.log_table(self._run_id, table, file)

    def finish(self, status: Status) -> None:
        if status in STATUS_OF:
            self._client.set_terminated(self._run_id, STATUS_OF[status])


def allowed_name(key: str) -> str:
    """A metric's name in the characters that MLflow allows: `pass@8` is `pass_at_8`."""
    return re.sub(r"[^\w\-. :/]", "_", key.replace("@", "_at_"))


def flat(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a configuration as strings, by their dotted paths."""
    if isinstance(config, Mapping) and config:
        for key, value in config.items():
            yield from flat(value, f"{path}.{key}".lstrip("."))
    elif isinstance(config, list) and any(isinstance(item, Mapping) for item in config):
        for number, value in enumerate(config):
            yield from flat(value, f"{path}.{number}")
    else:
        yield path, config if isinstance(config, str) else json.dumps(config)


def _log_parameters(client: Any, run_id: str, config: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Parameters of MLflow never change, so those of the first start stay. What produced the last start is in tags."""
    from mlflow.entities import Param, RunTag

    parameters = {key: value for key, value in config.items() if key != "provenance"}
    new = (Param(path, value[:PARAMETER_CHARACTERS]) for path, value in flat(parameters) if path not in known)
    for batch in _batches(new):
        client.log_batch(run_id, params=batch)
    origin = flat(config["provenance"], "provenance") if "provenance" in config else ()
    for batch in _batches(RunTag(allowed_name(path), value[:TAG_CHARACTERS]) for path, value in origin):
        client.log_batch(run_id, tags=batch)


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, ITEMS_PER_CALL)):
        yield batch


def _experiment(client: Any, name: str) -> str:
    """The id of an experiment, created if missing."""
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


def _default_uri() -> str | None:
    return os.environ.get("MLFLOW_TRACKING_URI")


def _url(tracking_uri: str | None, experiment_id: str, run_id: str) -> str | None:
    server = tracking_uri or _default_uri() or ""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}" if server.startswith("http") else None
