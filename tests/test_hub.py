"""Checkpoints named by their Hugging Face id, fetched from a server on this machine that speaks the hub's interface."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
from conftest import MakeCheckpoint
from packaging.version import Version
from safetensors.numpy import load_file

MAIN, TAGGED = "a" * 40, "b" * 40
REPOSITORY = "someone/small-gpt2"
RESUMES = Version(huggingface_hub.__version__) >= Version("1.20")


@dataclass
class Hub:
    """A repository of files per commit, and what is done to those who ask for them.

    Attributes:
        commits: file contents by name, by commit.
        revisions: commits by branch or tag.
        cut: how many more answers with a weight file's content break off half-way.
        down: whether weight files are answered with an error after that.
        fetched: the files asked for with GET.
        asked: how many requests there were.
    """

    commits: dict[str, dict[str, bytes]]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": MAIN, "v1": TAGGED})
    cut: int = 0
    down: bool = False
    fetched: list[str] = field(default_factory=list)
    asked: int = 0
    endpoint: str = ""

    def commit_of(self, revision: str) -> str | None:
        commit = self.revisions.get(revision, revision)
        return commit if commit in self.commits else None


class Handler(BaseHTTPRequestHandler):
    """Answers as https://huggingface.co/docs/hub/api says, as far as fetching a snapshot asks."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.asked += 1
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


OPEN = """
import sys, numpy
from gpt2onnx.errors import Gpt2OnnxError
from gpt2onnx.exporter.checkpoint import Checkpoint
try:
    checkpoint = Checkpoint.open(sys.argv[1], sys.argv[2] or None)
    numpy.save(sys.argv[3], checkpoint.tensor("wte.weight"))
    print(*sorted(path.name for path in checkpoint.folder.iterdir()))
except Gpt2OnnxError as error:
    print("refused:", error)
"""


def open_from(
    hub: Hub, cache: Path, repository: str = REPOSITORY, revision: str = "", **environment: str
) -> tuple[str, Path]:
    """Opens a checkpoint in a process of its own, as huggingface_hub reads its settings only once.

    Returns:
        What was printed: the names of the files that are there, or the error; and a file with the token embedding.
    """
    embedding = cache.parent / "embedding.npy"
    embedding.unlink(missing_ok=True)
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", OPEN, repository, revision, str(embedding)],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("\n") == 1, finished.stdout
    return finished.stdout.strip(), embedding


def assert_embedding(path: Path, folder: Path) -> None:
    wanted = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    assert np.array_equal(np.load(path), wanted)


def test_an_id_is_fetched_once_and_then_found_in_the_cache(
    hub: Hub, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    hub.commits[MAIN] |= {
        "onnx/model.safetensors": b"x",
        "model.fp16.safetensors": b"x",
        "README.md": b"x",
        "tf_model.h5": b"x",
    }
    for _ in range(2):
        printed, embedding = open_from(hub, tmp_path / "cache")
        # transformers, where it made the checkpoint, wrote a generation_config.json, too.
        assert printed.split() == sorted(path.name for path in checkpoints[MAIN].iterdir())
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(printed.split())
        assert_embedding(embedding, checkpoints[MAIN])
    assert sorted(hub.fetched) == printed.split()


@pytest.mark.parametrize(("revision", "commit"), [("main", MAIN), ("v1", TAGGED), (TAGGED, TAGGED)])
def test_revisions(revision: str, commit: str, hub: Hub, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    _, embedding = open_from(hub, tmp_path / "cache", revision=revision)
    assert_embedding(embedding, checkpoints[commit])


def test_pickles_are_fetched_only_where_there_is_nothing_better(
    hub: Hub, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")  # the lowest versions are tested without
    weights = load_file(checkpoints[MAIN] / "model.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, tmp_path / "weights.bin")
    hub.commits[MAIN]["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    open_from(hub, tmp_path / "cache")
    assert "pytorch_model.bin" not in hub.fetched
    del hub.commits[MAIN]["model.safetensors"]
    printed, embedding = open_from(hub, tmp_path / "another cache")
    assert printed == "config.json generation_config.json pytorch_model.bin tokenizer.json"
    assert_embedding(embedding, checkpoints[MAIN])
    # Nothing but the cache is needed from now on.
    printed, embedding = open_from(hub, tmp_path / "another cache", HF_HUB_OFFLINE="1")
    assert_embedding(embedding, checkpoints[MAIN])


@pytest.mark.parametrize(
    ("repository", "revision", "words"),
    [
        ("someone/nothing", "", ["someone/nothing", "knows none"]),
        ("nothing-at-all", "", ["nothing-at-all", "knows none"]),
        ("someone/gated", "", ["someone/gated", "access"]),
        (REPOSITORY, "v9", [REPOSITORY, "no revision 'v9'"]),
        ("no such/id!", "", ["no such/id!", "not a valid"]),
    ],
)
def test_what_isn_t_there_is_said(repository: str, revision: str, words: list[str], hub: Hub, tmp_path: Path) -> None:
    printed, _ = open_from(hub, tmp_path / "cache", repository, revision)
    assert printed.startswith("refused: ")
    assert all(word in printed for word in words), printed


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, hub: Hub, tmp_path: Path) -> None:
    del hub.commits[MAIN][name]
    printed, _ = open_from(hub, tmp_path / "cache")
    assert printed.startswith(f"refused: the repository '{REPOSITORY}' has no ")
    assert {"config.json": "config.json", "model.safetensors": "weights"}[name] in printed


def test_a_shard_that_isn_t_in_the_repository_is_named(hub: Hub, tmp_path: Path) -> None:
    del hub.commits[MAIN]["model.safetensors"]
    index = {"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}
    hub.commits[MAIN]["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.commits[MAIN]["model-00002-of-00002.safetensors"] = hub.commits[TAGGED]["model.safetensors"]
    printed, _ = open_from(hub, tmp_path / "cache")
    assert "model-00001-of-00002.safetensors is missing" in printed


@pytest.mark.skipif(not RESUMES, reason="this huggingface_hub doesn't take up cut downloads again")
def test_a_cut_connection_is_taken_up_again(hub: Hub, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    hub.cut = 1
    _, embedding = open_from(hub, tmp_path / "cache")
    assert_embedding(embedding, checkpoints[MAIN])
    assert hub.fetched.count("model.safetensors") == 2


def test_an_interrupted_download_leaves_nothing_half_and_can_be_repeated(
    hub: Hub, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    hub.cut, hub.down = 1, True
    printed, embedding = open_from(hub, tmp_path / "cache")
    assert printed.startswith("refused: ")
    assert "503" in printed or not RESUMES
    assert not embedding.exists()
    # What is half there doesn't count as a cached checkpoint either.
    printed, _ = open_from(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert printed.startswith("refused: ")
    hub.down = False
    _, embedding = open_from(hub, tmp_path / "cache")
    assert_embedding(embedding, checkpoints[MAIN])


def test_offline_needs_a_warm_cache_and_asks_nobody(hub: Hub, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    printed, _ = open_from(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert printed.startswith(f"refused: no checkpoint '{REPOSITORY}'")
    assert "cache" in printed
    assert hub.asked == 0
    open_from(hub, tmp_path / "cache")
    asked = hub.asked
    _, embedding = open_from(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert_embedding(embedding, checkpoints[MAIN])
    assert hub.asked == asked


def test_a_hub_out_of_reach_is_no_matter_with_a_warm_cache(
    hub: Hub, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    printed, _ = open_from(hub, tmp_path / "cache", **nobody)
    assert "can't be reached" in printed
    open_from(hub, tmp_path / "cache")
    _, embedding = open_from(hub, tmp_path / "cache", **nobody)
    assert_embedding(embedding, checkpoints[MAIN])


def test_the_command_line_exports_an_id_and_says_in_one_line_what_failed(hub: Hub, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gpt2onnx", "export", *arguments]
        return subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, timeout=60, check=False
        )

    failed = run(REPOSITORY, str(tmp_path / "bundle"), "--revision", "v9")
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert "v9" in failed.stderr
    assert not (tmp_path / "bundle").exists()
    done = run(REPOSITORY, str(tmp_path / "bundle"), "--revision", "v1")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "bundle" / "gpt2onnx.json").read_text())
    assert manifest["source"] == REPOSITORY
