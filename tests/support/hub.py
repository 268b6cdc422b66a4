"""A server on this machine that speaks the interface of the Hugging Face hub. Tests import its fixtures `hub` and `checkpoints`."""

import hashlib
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, utils

from support.checkpoints import MakeCheckpoint

MAIN, TAGGED = "a" * 40, "b" * 40
REPOSITORY = "someone/small-gpt2"


@dataclass
class Hub:
    """A repository of files per commit, and what is done to those who ask for them.

    Attributes:
        commits: file contents by name, by commit.
        revisions: commits by branch or tag.
        cut: how many more answers with a weight file's content break off half-way.
        down: whether weight files are answered with an error after that.
        fetched: the files asked for with GET.
        requests: how many there were.
    """

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": MAIN, "v1": TAGGED})
    cut: int = 0
    down: bool = False
    fetched: list[str] = field(default_factory=list)
    requests: int = 0
    endpoint: str = ""

    def commit_of(self, revision: str) -> str | None:
        commit = self.revisions.get(revision, revision)
        return commit if commit in self.commits else None

    @contextmanager
    def asked(self, cache: Path, **environment: str) -> Iterator[None]:
        """Lets huggingface_hub ask this server, with a cache of its own: as in a process that starts with these variables."""
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in (settings | environment).items():
                    patch.setenv(name, value)
                read_settings()
                yield
        finally:
            read_settings()


def read_settings() -> None:
    """Has huggingface_hub read its variables once more, and close the connections that it made by the earlier ones."""
    before = {name: value for name, value in vars(constants).items() if name.isupper()}
    importlib.reload(constants)
    # Before 1.0 its modules have copies.
    for module in [module for name, module in sys.modules.items() if name.startswith("huggingface_hub.")]:
        for name in before.keys() & vars(module).keys():
            if vars(module)[name] is before[name]:
                setattr(module, name, getattr(constants, name))
    if hasattr(utils, "close_session"):
        utils.close_session()
    else:  # before 1.0
        utils.reset_sessions()


class Handler(BaseHTTPRequestHandler):
    """Answers as https://huggingface.co/docs/hub/api says, as far as fetching a snapshot asks."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests += 1
        path = unquote(urlsplit(self.path).path)
        match path.strip("/").split("/"):
            case ["api", "models", owner, name, "revision", revision] if f"{owner}/{name}" == REPOSITORY:
                if commit := self.hub.commit_of(revision):
                    siblings = [{"rfilename": file} for file in self.hub.commits[commit]]
                    self.answer_json({"id": REPOSITORY, "modelId": REPOSITORY, "sha": commit, "siblings": siblings})
                else:
                    self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            case ["api", "models", owner, name, "tree", revision] if f"{owner}/{name}" == REPOSITORY:
                files = self.hub.commits[self.hub.commit_of(revision) or ""]
                self.answer_json(
                    [
                        {"type": "file", "path": file, "size": len(content), "oid": etag(content)}
                        for file, content in files.items()
                    ]
                )
            case [owner, name, "resolve", revision, *parts] if f"{owner}/{name}" == REPOSITORY:
                self.answer_file("/".join(parts), self.hub.commit_of(revision))
            case ["api", "models", "someone", "gated", *_]:
                self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            case _:
                self.answer(
                    401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}
                )

    def answer_file(self, name: str, commit: str | None) -> None:
        content = self.hub.commits.get(commit or "", {}).get(name)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit or ""})
            return
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": commit or "", "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self.answer(200, content, headers)
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.hub.fetched.append(name)
        weights = name.endswith((".safetensors", ".bin"))
        if weights and self.hub.cut:
            self.hub.cut -= 1
            self.answer(200, content, headers, sent=len(content) // 2)
        elif weights and self.hub.down:
            self.answer(503, b"", {})
        elif start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], headers)
        else:
            self.answer(200, content, headers)

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        if sent is not None:
            self.close_connection = True


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def checkpoints(make_checkpoint: MakeCheckpoint) -> dict[str, Path]:
    return {MAIN: make_checkpoint(weights_seed=1), TAGGED: make_checkpoint(weights_seed=2)}


@pytest.fixture
def hub(checkpoints: dict[str, Path]) -> Iterator[Hub]:
    commits = {
        commit: {path.name: path.read_bytes() for path in folder.iterdir()} for commit, folder in checkpoints.items()
    }
    hub = Hub(commits)
    handler = type("OwnHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()
