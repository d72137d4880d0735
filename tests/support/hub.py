"""A stand-in for the hub that accepts its clients' uploads: repositories, files, commits."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.http_server import serving

READ_ONLY_TOKEN = "hf_read_only"


@dataclass
class StandInHub:
    """What has been uploaded."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """By repository."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Content by name in a repository; large files, as in Git LFS, by their SHA-256."""
    messages: list[str] = field(default_factory=list)
    """Messages of the commits."""
    requests: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """A hub that listens; a weight file goes to it as to Git LFS, everything else within the commit."""
    hub = StandInHub()
    with serving(type("Handler", (_Handler,), {"hub": hub})) as hub.url:
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("/revision/")[0]
        if name not in self.hub.private:
            return self._answer({}, 404)
        self._answer({"id": name, "private": self.hub.private[name], "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append(self.path)
        if self.headers.get("Authorization") == f"Bearer {READ_ONLY_TOKEN}":
            return self._answer({"error": "no right to write"}, 403)
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path.endswith("/objects/batch"):
            addresses = [self._upload_address(one) for one in json.loads(body)["objects"]]
            return self._answer({"transfer": "basic", "objects": addresses})
        name = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
        if "/preupload/" in self.path:
            return self._answer({"files": [self._upload_mode(one["path"]) for one in json.loads(body)["files"]]})
        assert "/commit/" in self.path, self.path
        self._commit(name, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        self.hub.blobs[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.hub.private else 200
        self.hub.private.setdefault(name, wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self._answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, status)

    def _upload_mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _upload_address(self, wanted: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.hub.url}/upload/{wanted['oid']}", "header": {}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": {"upload": upload}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.files.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is printed."""
