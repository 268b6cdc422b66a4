"""Bundles in one file: the same bytes each time, and only the files that were packed come out of it.

Processes that end at any step: tests/exporter/test_faults.py.
"""

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.isolated import COMMAND_LINE, EXPORT_ONLY, REFERENCES, run
from support.systems import linux

import gpt2onnx
from gpt2onnx.errors import BundleError, OptionError, OutputError
from gpt2onnx.exporter.files.archive import pack, unpack
from gpt2onnx.models.bundle import MANIFEST, Bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> Path:
    return gpt2onnx.export(make_checkpoint(), tmp_path_factory.mktemp("small") / "bundle", parity=False).folder


@pytest.fixture(scope="module")
def archive(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(bundle, tmp_path_factory.mktemp("packed") / "bundle.tar.gz").path


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members(archive: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(archive) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def assert_refused(archive: Path, place: Path, match: str | None = None) -> str:
    """Refused in one line, with nothing left behind; returns the line."""
    before = sorted(place.rglob("*"))
    with pytest.raises(BundleError, match=match) as error:
        unpack(archive, place / "unpacked")
    assert sorted(place.rglob("*")) == before
    assert "\n" not in str(error.value)
    assert str(archive) in str(error.value)
    assert ".gpt2onnx-" not in str(error.value), "names a folder that is gone"
    return str(error.value)


def test_a_limit_on_what_is_unpacked(bundle: Path, archive: Path, tmp_path: Path, command_line: CommandLine) -> None:
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file() and path.name != MANIFEST)
    with pytest.raises(OptionError, match=f"{size:,} bytes would be unpacked"):
        unpack(archive, tmp_path / "unpacked", max_size=size - 1)
    done = command_line("unpack", archive, tmp_path / "unpacked", "--max-size", (size - 1) / 1e9)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert not list(tmp_path.iterdir())
    assert unpack(archive, tmp_path / "unpacked", max_size=size).folder.is_dir()


# What is packed


def test_same_bytes_whenever_and_wherever(bundle: Path, archive: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "other name", copy_function=shutil.copyfile)
    for index, path in enumerate([*copy.rglob("*"), copy]):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.utime(path, (index, 10**9 + index))
    assert pack(copy, tmp_path / "b.tar.gz").path.read_bytes() == archive.read_bytes()


def test_holds_nothing_of_time_place_and_user(archive: Path) -> None:
    content = archive.read_bytes()
    assert content[3] == 0, "gzip's header has a name or a comment"
    assert content[4:8] == bytes(4), "gzip's header has a time"
    for member, _ in members(archive):
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert (member.type, member.mode, member.pax_headers) == (tarfile.REGTYPE, 0o644, {})
    names = [member.name for member, _ in members(archive)]
    assert names == [MANIFEST, *sorted(names[1:])]


def test_other_tools_unpack_the_same(bundle: Path, archive: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "xzf", archive, "-C", tmp_path], check=True)
    assert content_of(tmp_path) == content_of(bundle)


def test_comes_back_as_it_was(tales_int8_bundle: Path, tmp_path: Path) -> None:
    packed, steps = tmp_path / "new folder" / "packed.tar.gz", list[tuple[int, int]]()
    made = pack(tales_int8_bundle, packed, progress=lambda done, total: steps.append((done, total)))
    content = content_of(tales_int8_bundle)
    assert (made.size, made.sha256) == (packed.stat().st_size, hashlib.sha256(packed.read_bytes()).hexdigest())
    assert {name: record.size for name, record in made.content.items()} == {n: len(c) for n, c in content.items()}
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1] == (sum(map(len, content.values())),) * 2
    assert content_of(unpack(packed, tmp_path / "unpacked").folder) == content


def test_what_is_not_whole_is_not_packed(bundle: Path, tmp_path: Path) -> None:
    for name in content_of(bundle):
        damaged = shutil.copytree(bundle, tmp_path / "damaged", dirs_exist_ok=True)
        content = bytearray((damaged / name).read_bytes())
        content[len(content) // 2] ^= 1
        (damaged / name).write_bytes(content)
        with pytest.raises(BundleError, match=name.split("/")[-1]):
            pack(damaged, tmp_path / "x.tar.gz")
    with pytest.raises(BundleError):
        pack(tmp_path / "nowhere", tmp_path / "x.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_file_that_changes_while_it_is_packed_is_found(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    last = copy / "tokenizer_config.json"
    for change in (lambda text: text[:-1], lambda text: text.swapcase()):
        text = last.read_text()
        with pytest.raises(BundleError, match="changed while it was packed"):
            pack(copy, tmp_path / "x.tar.gz", progress=lambda *_, text=text: last.write_text(change(text)))  # noqa: B023
        last.write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


# Targets


def test_pack_replaces_nothing_unasked(bundle: Path, archive: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.tar.gz"
    target.write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        pack(bundle, target)
    assert target.read_text() == "mine"
    pack(bundle, target, force=True)
    assert target.read_bytes() == archive.read_bytes()
    for force in (False, True):
        with pytest.raises(OutputError, match="is a folder"):
            pack(bundle, tmp_path, force=force)
        with pytest.raises(OutputError, match="would lie in the bundle"):
            pack(bundle, bundle / "onnx" / "x.tar.gz", force=force)
        with pytest.raises(OutputError, match="can't write"):
            pack(bundle, target / "x.tar.gz", force=force)
    Bundle.open(bundle).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar.gz"]


def test_unpack_replaces_nothing_unasked(archive: Path, bundle: Path, tales_int8_bundle: Path, tmp_path: Path) -> None:
    target = shutil.copytree(tales_int8_bundle, tmp_path / "unpacked")
    with pytest.raises(OutputError, match="--force"):
        unpack(archive, target)
    assert content_of(target) == content_of(tales_int8_bundle)
    unpack(archive, target, force=True)
    assert content_of(target) == content_of(bundle)
    (tmp_path / "empty").mkdir()
    assert content_of(unpack(archive, tmp_path / "empty").folder) == content_of(bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "unpacked"]


# Damaged and hostile archives


def test_cut_off_anywhere(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    cut = tmp_path / "cut.tar.gz"
    lengths = {*range(40), *range(len(content) - 40, len(content)), *range(0, len(content), len(content) // 100)}
    for length in lengths:
        cut.write_bytes(content[:length])
        assert_refused(cut, tmp_path)


@pytest.mark.parametrize(
    "below", [False, True], ids=["in the archive", "below the compression, its checksum right again"]
)
def test_flipped_anywhere(below: bool, archive: Path, bundle: Path, tmp_path: Path) -> None:
    """Refused, or harmless: in gzip's header, in a time that nobody reads, in padding."""
    packed, original, draw = archive.read_bytes(), content_of(bundle), random.Random(1)
    content = gzip.decompress(packed) if below else packed
    ends = [] if below else [*range(20), *range(len(content) - 20, len(content))]
    headers = [member.offset + byte for member, _ in members(archive) for byte in draw.sample(range(512), 8)] * below
    flipped, harmless = tmp_path / "flipped.tar.gz", []
    positions = [*ends, *headers, *draw.sample(range(len(content)), 80)]
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        flipped.write_bytes(gzip.compress(damaged, 1) if below else damaged)
        try:
            unpack(flipped, tmp_path / "unpacked")
        except BundleError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert content_of(tmp_path / "unpacked") == original, f"byte {position} flipped"
            shutil.rmtree(tmp_path / "unpacked")
            harmless.append(position)
        assert list(tmp_path.iterdir()) == [flipped]
    assert below or len(harmless) < len(positions) / 10


def repacked(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w:gz", format=form) as tar:
        for member, content in entries:
            tar.addfile(member, io.BytesIO(content))
    return path


Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"", **fields: Any) -> Entry:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def with_manifest(entries: list[Entry], **changes: Any) -> list[Entry]:
    """The entries after a manifest that was changed, and so has no hash of itself."""
    manifest = json.loads(entries[0][1]) | {"sha256": ""} | changes
    return [entry(MANIFEST, json.dumps(manifest).encode()), *entries[1:]]


def with_files(entries: list[Entry], *names: str) -> list[Entry]:
    """The entries and further files, which the manifest lists."""
    listed = {name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()} for name in names}
    files = json.loads(entries[0][1])["files"] | listed
    return [*with_manifest(entries, files=files), *(entry(name, b"x") for name in names)]


def sparse_headers(places: str, size: object) -> dict[str, str]:
    """Of an extended header: the places that aren't holes, and the size with the holes."""
    return {"GNU.sparse.map": places, "GNU.sparse.size": str(size)}


def old_sparse(name: str, size: int) -> bytes:
    """The header of a file of one hole, in GNU tar's older form, which tarfile reads and doesn't write."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410], header[483:495] = b"%011o\0%011o\0" % (size, 0), b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


HOSTILE: dict[str, Callable[[list[Entry]], list[Entry]]] = {
    "symlink in place of a file": lambda e: [*e[:-1], entry(e[-1][0].name, type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "symlink to a folder": lambda e: [e[0], entry("onnx", type=tarfile.SYMTYPE, linkname="/tmp"), *e[1:]],
    "hard link": lambda e: [*e[:-1], entry(e[-1][0].name, type=tarfile.LNKTYPE, linkname="config.json")],
    "device in place of a file": lambda e: [*e[:-1], entry(e[-1][0].name, type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "pipe in place of the manifest": lambda e: [entry(MANIFEST, type=tarfile.FIFOTYPE), *e[1:]],
    "folder": lambda e: [*e, entry("folder", type=tarfile.DIRTYPE)],
    "absolute path": lambda e: [*e, entry("/tmp/gpt2onnx-was-here", b"x")],
    "path upwards": lambda e: [*e, entry("../outside", b"x")],
    "path upwards in the manifest": lambda e: with_files(e, "../outside"),
    "absolute path in the manifest": lambda e: with_files(e, "/tmp/gpt2onnx-was-here"),
    "manifest that lists itself": lambda e: with_files(e, MANIFEST),
    "file below a file": lambda e: with_files(e[:1], "a", "a/b"),
    "file in place of a folder": lambda e: with_files(e[:1], "a/b", "a"),
    "file that isn't listed": lambda e: [*e, entry("other", b"x")],
    "file that comes twice": lambda e: [*e, e[-1]],
    "file that is missing": lambda e: e[:-1],
    "file of another size": lambda e: [*e[:-1], entry(e[-1][0].name, e[-1][1] + b" ")],
    "file of another content": lambda e: [*e[:-1], entry(e[-1][0].name, e[-1][1].swapcase())],
    "manifest in the wrong place": lambda e: [*e[1:], e[0]],
    "no manifest": lambda e: e[1:],
    "manifest of another kind": lambda e: [entry(MANIFEST, b"[1, 2]"), *e[1:]],
    "manifest of a newer format": lambda e: with_manifest(e, format_version=99),
    "manifest with a size below zero": lambda e: with_manifest(e, files={"a": {"size": -1, "sha256": ""}}),
    "manifest without a graph": lambda e: with_manifest(e[:1], files={}),
    "long name": lambda e: [*e, entry("a" * 100_000, b"x")],
    "long names of long names": lambda e: [*[entry("x", type=tarfile.GNUTYPE_LONGNAME)] * 1500, *e],
    "sparse map of letters": lambda e: [entry(MANIFEST, pax_headers=sparse_headers("a,b", 10)), *e[1:]],
    "sparse size of letters": lambda e: [entry(MANIFEST, pax_headers=sparse_headers("10,0", "z")), *e[1:]],
    "nothing": lambda e: [],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archive_is_refused(name: str, archive: Path, tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        if name == "long name" and form == tarfile.USTAR_FORMAT:
            continue  # has none
        hostile = repacked(tmp_path / "hostile.tar.gz", HOSTILE[name](members(archive)), form)
        assert_refused(hostile, tmp_path)
    assert not Path("/tmp/gpt2onnx-was-here").exists()


def test_what_hostile_archives_are_made_from_is_fine(archive: Path, bundle: Path, tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        whole = repacked(tmp_path / "whole.tar.gz", members(archive), form)
        assert content_of(unpack(whole, tmp_path / f"unpacked {form}").folder) == content_of(bundle)


def test_other_files_are_refused(archive: Path, bundle: Path, tmp_path: Path) -> None:
    plain = gzip.decompress(archive.read_bytes())
    others = {
        "empty": b"",
        "text": b"Once upon a time",
        "plain tar": plain,
        "random": random.Random(3).randbytes(5000),
        "gzip of text": gzip.compress(b"Once upon a time" * 1000),
        "gzip of nothing": gzip.compress(b""),
        "gzip of zeros": gzip.compress(bytes(100_000)),
        "more behind the end": gzip.compress(plain + b"x"),
        "more behind gzip's end": archive.read_bytes() + b"x",
        "another archive behind it": archive.read_bytes() * 2,
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, tmp_path)
    assert_refused(tmp_path / "nothing there", tmp_path, "No such file")
    assert_refused(bundle, tmp_path, "Is a directory")


# Each makes a gigabyte of a few kilobytes, on the disk or in tarfile's memory.
BOMBS = ["manifest", "file", "long name", "long name of a file", "extended header", "end", "hole", "hole of a file"]


@linux
@pytest.mark.parametrize("kind", BOMBS)
def test_bomb_takes_neither_memory_nor_disk(kind: str, archive: Path, tmp_path: Path) -> None:
    files = {"a": {"size": 1, "sha256": ""}} if kind in ("file", "hole of a file") else {}
    manifest = with_manifest(members(archive)[:1], files=files)
    size = 2**30

    def header(name: str, **fields: Any) -> bytes:
        return entry(name, **fields)[0].tobuf(tarfile.PAX_FORMAT if "pax_headers" in fields else tarfile.GNU_FORMAT)

    start, bomb_header = {
        "manifest": ([], header(MANIFEST, size=size)),
        "file": (manifest, header("a", size=size)),
        "long name": ([], header("a", size=size, type=tarfile.GNUTYPE_LONGNAME)),
        "long name of a file": (manifest, header("a", size=size, type=tarfile.GNUTYPE_LONGNAME)),
        "extended header": ([], header("a", size=size, type=tarfile.XHDTYPE)),
        "end": (manifest, b""),
        "hole": ([], header(MANIFEST, pax_headers=sparse_headers(f"{size},0", size))),
        "hole of a file": (manifest, old_sparse("a", size)),
    }[kind]
    bomb = tmp_path / "bomb.tar.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for member, content in start:
            file.write(member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE))
        file.write(bomb_header)
        for _ in range(16):
            file.write(bytes(2**24))
    limited = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))\n" + COMMAND_LINE
    )
    status, out, err = run(limited, "unpack", bomb, tmp_path / "unpacked")
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert str(bomb) in err, "stopped by the system"
    assert list(tmp_path.iterdir()) == [bomb]


def test_no_room_for_it(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OutputError, match=r"takes [\d,]+ bytes and 1,000 are free"):
        unpack(archive, tmp_path / "unpacked")
    assert not list(tmp_path.iterdir())


# The command line


def test_command_line(bundle: Path, archive: Path, tmp_path: Path, command_line: CommandLine) -> None:
    packed, unpacked = tmp_path / "x.tar.gz", tmp_path / "unpacked"
    done = command_line("pack", bundle, packed, "--json")
    assert (done.code, done.err) == (0, "")
    facts = json.loads(done.out)
    assert facts["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()
    assert facts["bytes"] == packed.stat().st_size
    assert facts["content"] == {name: len(content) for name, content in content_of(bundle).items()}
    done = command_line("unpack", packed, unpacked, "--json")
    assert (done.code, done.err) == (0, "")
    facts = json.loads(done.out)
    files = {name: content for name, content in content_of(bundle).items() if name != MANIFEST}
    assert (facts["bundle"], facts["files"]) == (str(unpacked), len(files))
    assert facts["bytes"] == sum(map(len, files.values()))
    for command in (["pack", bundle, packed], ["unpack", packed, unpacked]):
        done = command_line(*command)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert command_line(*command, "--force", "--quiet").out == ""
        assert str(command[-1]) in command_line(*command, "--force").out
    assert packed.read_bytes() == archive.read_bytes()


def test_needs_neither_numpy_nor_onnxruntime(bundle: Path, tmp_path: Path) -> None:
    absent = (*REFERENCES, *EXPORT_ONLY, "onnxruntime", "numpy", "tokenizers", "tqdm", "platformdirs")
    for command in (["pack", bundle, tmp_path / "x.tar.gz"], ["unpack", tmp_path / "x.tar.gz", tmp_path / "unpacked"]):
        status, _, err = run(COMMAND_LINE, *command, without=absent)
        assert (status, err) == (0, "")
    assert content_of(tmp_path / "unpacked") == content_of(bundle)
