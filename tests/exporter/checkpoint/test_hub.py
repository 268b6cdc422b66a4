"""Checkpoints named by their Hugging Face id, fetched from a server on this machine that speaks the hub's interface."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from packaging.version import Version
from safetensors.numpy import load_file, save_file
from support import torch_files
from support.commands import CommandLine
from support.golden import FOLDER
from support.hub import MAIN, REPOSITORY, TAGGED, Hub, checkpoints, hub

from gpt2onnx.errors import CheckpointError, OptionError
from gpt2onnx.exporter.checkpoint.checkpoint import Checkpoint

__all__ = ["checkpoints", "hub"]  # fixtures

RESUMES = Version(huggingface_hub.__version__) >= Version("1.20")


def open_from(hub: Hub, cache: Path, revision: str | None = None, **environment: str) -> Checkpoint:
    """Opens the one repository that there is."""
    with hub.asked(cache, **environment):
        return Checkpoint.open(REPOSITORY, revision)


def refused(hub: Hub, cache: Path, source: str = REPOSITORY, revision: str | None = None, **environment: str) -> str:
    """Why a repository can't be opened."""
    with hub.asked(cache, **environment), pytest.raises(CheckpointError) as error:
        Checkpoint.open(source, revision)
    return str(error.value)


def names(checkpoint: Checkpoint) -> list[str]:
    return sorted(path.name for path in checkpoint.folder.iterdir())


def assert_embedding(checkpoint: Checkpoint, folder: Path) -> None:
    wanted = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    assert np.array_equal(checkpoint.tensor("wte.weight"), wanted)


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
        opened = open_from(hub, tmp_path / "cache")
        assert names(opened) == sorted(path.name for path in checkpoints[MAIN].iterdir())
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names(opened))
        assert_embedding(opened, checkpoints[MAIN])
    assert sorted(hub.fetched) == names(opened)


def test_revisions(hub: Hub, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for revision, commit in {"main": MAIN, TAGGED: TAGGED, "v1": TAGGED}.items():
        assert_embedding(open_from(hub, tmp_path / "cache", revision), checkpoints[commit])


def test_a_revision_is_of_the_hub_alone(
    checkpoints: dict[str, Path], tmp_path: Path, command_line: CommandLine
) -> None:
    for source in ("tales", checkpoints[MAIN], checkpoints[MAIN] / "model.safetensors"):
        with pytest.raises(OptionError, match="revision goes with a Hugging Face id"):
            Checkpoint.open(str(source), "v1")
        done = command_line("export", source, tmp_path / "bundle", "--revision", "v1")
        assert (done.code, done.err.count("\n")) == (1, 1)


def test_an_empty_source_is_not_the_current_folder(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoints[MAIN])
    with pytest.raises(CheckpointError, match="the source is empty"):
        Checkpoint.open("")
    with pytest.raises(CheckpointError, match="the source is empty"):
        Checkpoint.open("tales", adapter="")
    Checkpoint.open(".")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_adapter_and_its_base(form: str, hub: Hub, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base, name = load_file(checkpoints[TAGGED] / "model.safetensors")["transformer.wte.weight"], f"adapter_model.{form}"
    save = torch_files.save if form == "bin" else save_file
    save({"base_model.model.transformer.wte.weight": base + 1}, tmp_path / name)
    config = {"peft_type": "LORA", "base_model_name_or_path": REPOSITORY, "revision": "v1"}
    hub.commits[MAIN] = {name: (tmp_path / name).read_bytes(), "adapter_config.json": json.dumps(config).encode()}
    opened = open_from(hub, tmp_path / "cache", "main")
    assert "model.safetensors" in names(opened)
    assert np.array_equal(opened.tensor("wte.weight"), base + 1)


def test_pickles_are_fetched_only_where_there_is_nothing_better(
    hub: Hub, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    torch_files.save(load_file(checkpoints[MAIN] / "model.safetensors"), tmp_path / "weights.bin")
    hub.commits[MAIN]["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    open_from(hub, tmp_path / "cache")
    assert "pytorch_model.bin" not in hub.fetched
    del hub.commits[MAIN]["model.safetensors"]
    opened = open_from(hub, tmp_path / "another cache")
    assert names(opened) == ["config.json", "generation_config.json", "pytorch_model.bin", "tokenizer.json"]
    assert_embedding(opened, checkpoints[MAIN])
    # Nothing but the cache is needed from now on.
    assert_embedding(open_from(hub, tmp_path / "another cache", HF_HUB_OFFLINE="1"), checkpoints[MAIN])


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("h5", "tf_model.h5"),
        ("flax", "flax_model.msgpack"),
        ("rust", "rust_model.ot"),
        ("gptq", "gptq_model-4bit-16g.safetensors"),
    ],
)
def test_other_weights_are_fetched_where_there_are_no_better(form: str, name: str, hub: Hub, tmp_path: Path) -> None:
    if form == "h5":
        pytest.importorskip("h5py", reason="h5py (extra formats) isn't installed")
    files = FOLDER / "other_formats" / form
    hub.commits[MAIN] = {each: (files / each).read_bytes() for each in ("config.json", name)}
    opened = open_from(hub, tmp_path / "cache")
    assert np.array_equal(opened.tensor("wte.weight"), Checkpoint.open(str(files)).tensor("wte.weight"))


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("someone/nothing", None, ["someone/nothing", "knows none"]),
        ("nothing-at-all", None, ["nothing-at-all", "knows none"]),
        ("someone/gated", None, ["someone/gated", "access"]),
        (REPOSITORY, "v9", [REPOSITORY, "no revision 'v9'"]),
        ("no such/id!", None, ["no such/id!", "not a valid"]),
    ],
)
def test_what_isn_t_there_is_said(
    source: str, revision: str | None, words: list[str], hub: Hub, tmp_path: Path
) -> None:
    message = refused(hub, tmp_path / "cache", source, revision)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name: str, hub: Hub, tmp_path: Path) -> None:
    del hub.commits[MAIN][name]
    message = refused(hub, tmp_path / "cache")
    assert message.startswith(f"the repository '{REPOSITORY}' has no ")
    assert {"config.json": "config.json", "model.safetensors": "weights"}[name] in message


def test_a_shard_that_isn_t_in_the_repository_is_named(hub: Hub, tmp_path: Path) -> None:
    del hub.commits[MAIN]["model.safetensors"]
    index = {"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}
    hub.commits[MAIN]["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.commits[MAIN]["model-00002-of-00002.safetensors"] = hub.commits[TAGGED]["model.safetensors"]
    assert "model-00001-of-00002.safetensors is missing" in refused(hub, tmp_path / "cache")


@pytest.mark.skipif(not RESUMES, reason="this huggingface_hub doesn't take up cut downloads again")
def test_a_cut_connection_is_taken_up_again(hub: Hub, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    hub.cut = 1
    assert_embedding(open_from(hub, tmp_path / "cache"), checkpoints[MAIN])
    assert hub.fetched.count("model.safetensors") == 2


def test_an_interrupted_download_leaves_nothing_half_and_can_be_repeated(
    hub: Hub, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    hub.cut, hub.down = 1, True
    message = refused(hub, tmp_path / "cache")
    assert "503" in message or not RESUMES
    # What is half there doesn't count as a cached checkpoint either.
    refused(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    hub.down = False
    assert_embedding(open_from(hub, tmp_path / "cache"), checkpoints[MAIN])


def test_offline_needs_a_warm_cache_and_asks_nobody(hub: Hub, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    message = refused(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert message.startswith(f"no checkpoint '{REPOSITORY}'")
    assert "cache" in message
    assert hub.requests == 0
    open_from(hub, tmp_path / "cache")
    asked = hub.requests
    assert_embedding(open_from(hub, tmp_path / "cache", HF_HUB_OFFLINE="1"), checkpoints[MAIN])
    assert hub.requests == asked


def test_a_hub_out_of_reach_is_no_matter_with_a_warm_cache(
    hub: Hub, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "can't be reached" in refused(hub, tmp_path / "cache", **nobody)
    open_from(hub, tmp_path / "cache")
    assert_embedding(open_from(hub, tmp_path / "cache", **nobody), checkpoints[MAIN])


def test_the_command_line_exports_an_id_and_says_in_one_line_what_failed(
    hub: Hub, tmp_path: Path, command_line: CommandLine
) -> None:
    export = ["export", "--no-parity", REPOSITORY, tmp_path / "bundle", "--revision"]
    with hub.asked(tmp_path / "cache"):
        failed = command_line(*export, "v9")
        assert (failed.code, failed.err.count("\n")) == (1, 1)
        assert "v9" in failed.err
        assert not (tmp_path / "bundle").exists()
        done = command_line(*export, "v1")
    assert (done.code, done.err) == (0, "")
    manifest = json.loads((tmp_path / "bundle" / "gpt2onnx.json").read_text())
    assert manifest["source"] == REPOSITORY
