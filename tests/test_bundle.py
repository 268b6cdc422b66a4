"""What a bundle says of itself is checked."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import CommandLine

from gpt2onnx.errors import BundleError
from gpt2onnx.models.bundle import MANIFEST, Bundle


@pytest.fixture
def copy(tales_int8_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return shutil.copytree(tales_int8_bundle, tmp_path / "bundle")


def files_of(bundle: Path) -> list[Path]:
    return sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != MANIFEST)


def test_whole_bundle_verifies(copy: Path, command_line: CommandLine) -> None:
    done = command_line("verify", copy, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["files"] == len(files_of(copy))


def test_any_flipped_byte_is_found(copy: Path) -> None:
    for path in files_of(copy):
        content = path.read_bytes()
        for position in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(BundleError, match=path.name):
                Bundle.open(copy).verify()
        path.write_bytes(content)
    Bundle.open(copy).verify()


def test_missing_and_shortened_files_are_found_when_it_is_opened(copy: Path) -> None:
    for path in files_of(copy):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(BundleError, match=path.name):
            Bundle.open(copy)
        path.unlink()
        with pytest.raises(BundleError, match=path.name):
            Bundle.open(copy)
        path.write_bytes(content)


def test_foreign_file_is_found(copy: Path) -> None:
    (copy / "onnx" / "other.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"other\.onnx is not in the manifest"):
        Bundle.open(copy).verify()


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 99},
        {"files": {"../outside": {"size": 1, "sha256": "0"}}},
        {"files": {"/etc/passwd": {"size": 1, "sha256": "0"}}},
        {"files": []},
        {"unknown": 1},
    ],
    ids=str,
)
def test_manifest_that_cannot_be_right_is_refused(copy: Path, change: dict[str, object]) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(BundleError):
        Bundle.open(copy)
