"""Checkpoints named by their Hugging Face id, fetched from a server on this machine that speaks the hub's interface."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from packaging.version import Version
from safetensors.numpy import load_file, save_file
from support import torch_files
from support.golden import FOLDER
from support.hub import MAIN, REPOSITORY, TAGGED, Hub, checkpoints, hub

from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint

__all__ = ["checkpoints", "hub"]  # fixtures

RESUMES = Version(huggingface_hub.__version__) >= Version("1.20")

OPEN = """
import json, sys, numpy
from gpt2onnx.errors import Gpt2OnnxError
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint
for repository, revision, embedding in json.loads(sys.argv[1]):
    try:
        checkpoint = Checkpoint.open(repository, revision or None)
        numpy.save(embedding, checkpoint.tensor("wte.weight"))
        print(*sorted(path.name for path in checkpoint.folder.iterdir()))
    except Gpt2OnnxError as error:
        print("refused:", error)
"""


def open_all_from(
    hub: Hub, cache: Path, asked: Sequence[tuple[str, str]], **environment: str
) -> list[tuple[str, Path]]:
    """Opens repositories at revisions in a process of its own, as huggingface_hub reads its settings only once.

    Returns:
        For each what was printed: the names of the files that are there, or the error; and a file with the token embedding.
    """
    embeddings = [cache.parent / f"embedding{index}.npy" for index in range(len(asked))]
    for path in embeddings:
        path.unlink(missing_ok=True)
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    all_asked = [[*each, str(path)] for each, path in zip(asked, embeddings, strict=True)]
    finished = subprocess.run(
        [sys.executable, "-c", OPEN, json.dumps(all_asked)],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return list(zip(finished.stdout.splitlines(), embeddings, strict=True))


def open_from(hub: Hub, cache: Path, **environment: str) -> tuple[str, Path]:
    """As `open_all_from`, the one repository that there is."""
    (told,) = open_all_from(hub, cache, [(REPOSITORY, "")], **environment)
    return told


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
    for printed, embedding in open_all_from(hub, tmp_path / "cache", [(REPOSITORY, "")] * 2):
        assert printed.split() == sorted(path.name for path in checkpoints[MAIN].iterdir())
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(printed.split())
        assert_embedding(embedding, checkpoints[MAIN])
    assert sorted(hub.fetched) == printed.split()


def test_revisions(hub: Hub, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    commits = {"main": MAIN, TAGGED: TAGGED, "v1": TAGGED}
    told = open_all_from(hub, tmp_path / "cache", [(REPOSITORY, revision) for revision in commits])
    for (_, embedding), commit in zip(told, commits.values(), strict=True):
        assert_embedding(embedding, checkpoints[commit])


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_adapter_and_its_base(form: str, hub: Hub, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base, name = load_file(checkpoints[TAGGED] / "model.safetensors")["transformer.wte.weight"], f"adapter_model.{form}"
    save = torch_files.save if form == "bin" else save_file
    save({"base_model.model.transformer.wte.weight": base + 1}, tmp_path / name)
    config = {"peft_type": "LORA", "base_model_name_or_path": REPOSITORY, "revision": "v1"}
    hub.commits[MAIN] = {name: (tmp_path / name).read_bytes(), "adapter_config.json": json.dumps(config).encode()}
    ((printed, embedding),) = open_all_from(hub, tmp_path / "cache", [(REPOSITORY, "main")])
    assert "model.safetensors" in printed
    assert np.array_equal(np.load(embedding), base + 1)


def test_pickles_are_fetched_only_where_there_is_nothing_better(
    hub: Hub, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    torch_files.save(load_file(checkpoints[MAIN] / "model.safetensors"), tmp_path / "weights.bin")
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


@pytest.mark.parametrize(("form", "name"), [("h5", "tf_model.h5"), ("flax", "flax_model.msgpack")])
def test_weights_for_other_frameworks_are_fetched_where_there_are_no_more(
    form: str, name: str, hub: Hub, tmp_path: Path
) -> None:
    if form == "h5":
        pytest.importorskip("h5py", reason="h5py (extra formats) isn't installed")
    files = FOLDER / "other_formats" / form
    hub.commits[MAIN] = {each: (files / each).read_bytes() for each in ("config.json", name)}
    _, embedding = open_from(hub, tmp_path / "cache")
    assert np.array_equal(np.load(embedding), Checkpoint.open(str(files)).tensor("wte.weight"))


MISSING = {
    ("someone/nothing", ""): ["someone/nothing", "knows none"],
    ("nothing-at-all", ""): ["nothing-at-all", "knows none"],
    ("someone/gated", ""): ["someone/gated", "access"],
    (REPOSITORY, "v9"): [REPOSITORY, "no revision 'v9'"],
    ("no such/id!", ""): ["no such/id!", "not a valid"],
}


def test_what_isn_t_there_is_said(hub: Hub, tmp_path: Path) -> None:
    told = open_all_from(hub, tmp_path / "cache", list(MISSING))
    for (printed, embedding), words in zip(told, MISSING.values(), strict=True):
        assert printed.startswith("refused: ")
        assert all(word in printed for word in words), printed
        assert not embedding.exists()


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
        command = [sys.executable, "-m", "gpt2onnx", "export", "--no-parity", *arguments]
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
