"""What the hub does not provide, requested by its real clients: its address does not answer, or a server refuses."""

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from tests.support.http_server import serving
from tests.support.tiny_run import REPOSITORY

CLOSED_ADDRESS = "http://127.0.0.1:9"
ASK_FOR_EVERYTHING = """
import sys, time
time.sleep = lambda seconds: None  # the clients wait between their attempts
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.data.rows import read_rows
from megatron_dsrl.data.tokenizer import load_tokenizer
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.model.source import find_config_json
for name in sys.argv[1:]:
    for ask in (
        lambda: find_config_json(name),
        lambda: resolve_model_folder(name),
        lambda: load_tokenizer(name),
        lambda: read_rows(PromptSetConfig(source=name), "data"),
    ):
        try:
            ask()
        except UserError as error:
            print("->", error)
"""
WHAT = (
    ("model.path: '{0}' is not a local folder, and", "model"),
    ("model.path: '{0}' is not a local folder, and", "model"),
    ("model.path: '{0}' is not a local folder, and", "tokenizer"),
    (
        "data.source: '{0}' is not a local .jsonl, .ndjson, .json, .csv, .tsv, .parquet file, and",
        "data set (subset None, split 'train')",
    ),
)
"""Beginning of the message, and what was looked for."""


class RefusingHub(BaseHTTPRequestHandler):
    """Refuses as the hub does: with a status and an error code, `org/gated` differently from everything else."""

    def do_GET(self) -> None:
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    """Its address."""
    with serving(RefusingHub) as address:
        yield address


def messages(endpoint: str, cache: os.PathLike, *names: str, **variables: str) -> list[str]:
    """What a user is told of the model's configuration, the model, the tokenizer and the data set of each name."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache)} | variables
    ended = subprocess.run(
        [sys.executable, "-c", ASK_FOR_EVERYTHING, *names],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.removeprefix("-> ").rstrip().split("\n-> ")


def test_a_hub_that_cannot_be_reached(tmp_path) -> None:
    told = messages(CLOSED_ADDRESS, tmp_path, "org/some")
    why = (
        f"{CLOSED_ADDRESS} cannot be reached and the hub's cache does not have it: "
        "download it on a machine with a network"
    )
    expected = [f"{what.format('org/some')} {why}" for what, _ in WHAT]
    assert [message[: len(beginning)] for message, beginning in zip(told, expected, strict=True)] == expected


def test_what_is_gated_and_what_the_hub_does_not_know(refusing_hub, tmp_path) -> None:
    gated, unknown = "is gated: request access on its page, and set HF_TOKEN", "that you can read: check the name"
    expected = [f"{what.format('org/gated')} the hub's {kind} {gated}" for what, kind in WHAT]
    expected += [f"{what.format('org/none')} the hub has no such {kind} {unknown}" for what, kind in WHAT]
    told = messages(refusing_hub, tmp_path, "org/gated", "org/none")
    assert [message[: len(beginning)] for message, beginning in zip(told, expected, strict=True)] == expected


@pytest.mark.slow
def test_without_a_network_by_intention(tmp_path) -> None:
    told = messages(CLOSED_ADDRESS, tmp_path, "org/some", HF_HUB_OFFLINE="1")
    assert len(told) == len(WHAT)
    assert all("HF_HUB_OFFLINE is set and the hub's cache does not have it: " in line for line in told)
