"""Bundles in one file: the same bytes each time, and nothing but what was packed comes out of it."""

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.isolated import EXPORT_ONLY, REFERENCES, run
from support.systems import linux, posix

import gpt2onnx
from gpt2onnx.errors import BundleError, OutputError
from gpt2onnx.exporter.files.archive import pack, unpack
from gpt2onnx.models.bundle import MANIFEST, Bundle

Content = dict[str, bytes]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> Path:
    return gpt2onnx.export(make_checkpoint(), tmp_path_factory.mktemp("small") / "bundle", parity=False).folder


@pytest.fixture(scope="module")
def archive(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(bundle, tmp_path_factory.mktemp("packed") / "bundle.tar.gz").path


def content_of(folder: Path) -> Content:
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
    assert ".new" not in str(error.value), "names a folder that is gone"
    return str(error.value)


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
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    for place in ("other", "other/file"):
        with pytest.raises(OutputError, match="is not a"):
            unpack(archive, tmp_path / place, force=True)
    (tmp_path / "empty").mkdir()
    assert content_of(unpack(archive, tmp_path / "empty").folder) == content_of(bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "other", "unpacked"]


# Damaged and hostile archives


def test_cut_off_anywhere(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    cut = tmp_path / "cut.tar.gz"
    lengths = {*range(40), *range(len(content) - 40, len(content)), *range(0, len(content), len(content) // 100)}
    for length in lengths:
        cut.write_bytes(content[:length])
        assert_refused(cut, tmp_path)


def test_flipped_anywhere(archive: Path, bundle: Path, tmp_path: Path) -> None:
    """Refused, or of no consequence: gzip's header and what fills its blocks up say nothing of the content."""
    content, original = archive.read_bytes(), content_of(bundle)
    flipped, draw = tmp_path / "flipped.tar.gz", random.Random(1)
    positions = [*range(20), *range(len(content) - 20, len(content)), *draw.sample(range(len(content)), 300)]
    harmless = []
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        flipped.write_bytes(damaged)
        try:
            unpack(flipped, tmp_path / "unpacked")
        except BundleError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert content_of(tmp_path / "unpacked") == original, f"byte {position} flipped"
            shutil.rmtree(tmp_path / "unpacked")
            harmless.append(position)
        assert list(tmp_path.iterdir()) == [flipped]
    assert len(harmless) < len(positions) / 10


def test_flipped_below_the_compression(archive: Path, bundle: Path, tmp_path: Path) -> None:
    """A flip in what gzip holds, with a checksum that is right again: the hashes and tar's own sums find it."""
    content, original = gzip.decompress(archive.read_bytes()), content_of(bundle)
    flipped, draw = tmp_path / "flipped.tar.gz", random.Random(2)
    headers = [member.offset + byte for member, _ in members(archive) for byte in draw.sample(range(512), 8)]
    for position in [*headers, *draw.sample(range(len(content)), 80)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        flipped.write_bytes(gzip.compress(damaged, 1))
        try:
            unpack(flipped, tmp_path / "unpacked")
        except BundleError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:  # the padding behind a file, or a time that nobody reads
            assert content_of(tmp_path / "unpacked") == original, f"byte {position} flipped"
            shutil.rmtree(tmp_path / "unpacked")
        assert list(tmp_path.iterdir()) == [flipped]


def repacked(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w:gz", format=form) as tar:
        for member, content in entries:
            tar.addfile(member, io.BytesIO(content))
    return path


def entry(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def with_manifest(entries: list[tuple[tarfile.TarInfo, bytes]], **changes: Any) -> list[tuple[tarfile.TarInfo, bytes]]:
    """The entries behind a manifest that was changed, and so has no hash of itself."""
    manifest = json.loads(entries[0][1]) | {"sha256": ""} | changes
    return [entry(MANIFEST, json.dumps(manifest).encode()), *entries[1:]]


Entries = list[tuple[tarfile.TarInfo, bytes]]
HOSTILE: dict[str, Callable[[Entries], Entries]] = {
    "symlink in place of a file": lambda e: [*e[:-1], entry(e[-1][0].name, type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "symlink to a folder": lambda e: [e[0], entry("onnx", type=tarfile.SYMTYPE, linkname="/tmp"), *e[1:]],
    "hard link": lambda e: [*e[:-1], entry(e[-1][0].name, type=tarfile.LNKTYPE, linkname="config.json")],
    "device": lambda e: [*e, entry("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "pipe": lambda e: [*e, entry("pipe", type=tarfile.FIFOTYPE)],
    "folder": lambda e: [*e, entry("folder", type=tarfile.DIRTYPE)],
    "absolute path": lambda e: [*e, entry("/tmp/gpt2onnx-was-here", b"x")],
    "path upwards": lambda e: [*e, entry("../outside", b"x")],
    "path upwards in the manifest": lambda e: with_manifest(
        [*e, entry("../outside", b"x")],
        files=json.loads(e[0][1])["files"] | {"../outside": {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}},
    ),
    "absolute path in the manifest": lambda e: with_manifest(
        [*e, entry("/tmp/gpt2onnx-was-here", b"x")],
        files={"/tmp/gpt2onnx-was-here": {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}},
    ),
    "manifest that lists itself": lambda e: with_manifest(
        [*e, entry(MANIFEST, b"x")],
        files=json.loads(e[0][1])["files"] | {MANIFEST: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}},
    ),
    "file below a file": lambda e: with_manifest(
        [e[0], entry("a", b"x"), entry("a/b", b"x")],
        files={name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()} for name in ("a", "a/b")},
    ),
    "file that isn't listed": lambda e: [*e, entry("other", b"x")],
    "file that comes twice": lambda e: [*e, e[-1]],
    "file that is missing": lambda e: e[:-1],
    "file of another size": lambda e: [*e[:-1], entry(e[-1][0].name, e[-1][1] + b" ")],
    "file of another content": lambda e: [*e[:-1], entry(e[-1][0].name, e[-1][1].swapcase())],
    "manifest in the wrong place": lambda e: [*e[1:], e[0]],
    "no manifest": lambda e: e[1:],
    "manifest twice": lambda e: [e[0], *e],
    "manifest of another kind": lambda e: [entry(MANIFEST, b"[1, 2]"), *e[1:]],
    "manifest that isn't JSON": lambda e: [entry(MANIFEST, b"{"), *e[1:]],
    "manifest of a newer format": lambda e: with_manifest(e, format_version=99),
    "manifest with a size below zero": lambda e: with_manifest(e, files={"a": {"size": -1, "sha256": ""}}),
    "manifest with a size of a wrong type": lambda e: with_manifest(e, files={"a": {"size": "1", "sha256": ""}}),
    "manifest without a graph": lambda e: with_manifest(e[:1], files={}),
    "long name": lambda e: [*e, entry("a" * 100_000, b"x")],
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


# Each makes gigabytes of a few kilobytes, or would have tarfile keep them in memory.
BOMBS = ["manifest", "file", "long name", "extended header", "end"]


@linux
@pytest.mark.parametrize("kind", BOMBS)
def test_bomb_takes_neither_memory_nor_disk(kind: str, archive: Path, tmp_path: Path) -> None:
    gigabyte = 2**30
    manifest = members(archive)[0][1]
    listed = json.loads(manifest) | {"sha256": "", "files": {"a": {"size": 1, "sha256": ""}}}
    first, second = {
        "manifest": (entry(MANIFEST, size=gigabyte)[0], None),
        "file": (entry(MANIFEST)[0], entry("a", size=gigabyte)[0]),
        "long name": (entry("a", size=gigabyte, type=tarfile.GNUTYPE_LONGNAME)[0], None),
        "extended header": (entry("a", size=gigabyte, type=tarfile.XHDTYPE)[0], None),
        "end": (entry(MANIFEST)[0], None),
    }[kind]
    bomb = tmp_path / "bomb.tar.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        text = json.dumps(listed).encode() if kind == "file" else json.dumps(listed | {"files": {}}).encode()
        if kind in ("file", "end"):
            first.size = len(text)
        file.write(first.tobuf(tarfile.GNU_FORMAT))
        if kind in ("file", "end"):
            file.write(text + bytes(-len(text) % 512))
        if second is not None:
            file.write(second.tobuf(tarfile.GNU_FORMAT))
        zeros = bytes(2**24)
        for _ in range(gigabyte // 2**24 // 4):
            file.write(zeros)
    limited = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))\n" + "from gpt2onnx.cli.main import main; main()"
    )
    status, out, err = run(limited, "unpack", bomb, tmp_path / "unpacked")
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert list(tmp_path.iterdir()) == [bomb]


def test_no_room_for_it(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OutputError, match=r"takes [\d,]+ bytes and 1,000 are free"):
        unpack(archive, tmp_path / "unpacked")
    assert not list(tmp_path.iterdir())


@posix
def test_full_disk_leaves_nothing(bundle: Path, archive: Path, tmp_path: Path) -> None:
    for limit in (0, 500, 20_000):
        for command in (["pack", bundle, tmp_path / "x.tar.gz"], ["unpack", archive, tmp_path / "unpacked"]):
            limited = (
                f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
                "from gpt2onnx.cli.main import main; main()"
            )
            status, out, err = run(limited, *command)
            assert (status, out, err.count("\n")) == (1, "", 1), err
            assert "can't write" in err
            assert not list(tmp_path.iterdir())


# Killed and interrupted

# Runs a command again and again, each time sending itself the signal one step later: before every file
# that it opens, every folder that it makes, renames or removes. After each run the state is one of
# `allowed`; a run that comes to its end leaves the target alone.
STEPS = """
import json, os, shutil, signal, sys
from pathlib import Path
from gpt2onnx.cli.main import main
from gpt2onnx.exporter import archive
from gpt2onnx.cli import pack, unpack
place, number, arguments = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree", "fcntl.flock", "ctypes.dlsym"}
def run(step):
    count = 0
    def hook(event, _):
        nonlocal count
        if event in EVENTS and armed:
            count += 1
            if count == step:
                os.kill(os.getpid(), number)
    armed = False
    sys.addaudithook(hook)
    sys.argv = ["gpt2onnx", *arguments]
    sys.stderr = open(os.devnull, "w")
    armed = True
    main()
def content(path):
    if path.is_dir():
        return {str(each.relative_to(path)): content(each) for each in sorted(path.rglob("*")) if each.is_file()}
    import hashlib
    return hashlib.sha256(path.read_bytes()).hexdigest()
states, codes, left, step = [], [], [], 0
before = place.with_name("before")
while True:
    step += 1
    child = os.fork()
    if child == 0:
        try:
            run(step)
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    codes.append(os.waitstatus_to_exitcode(status))
    found = sorted(place.iterdir())
    states.append({each.name: content(each) for each in found if not each.name.startswith(".")})
    if codes[-1] == 0:
        break
    # From the start again, but for what lies about.
    for each in place.iterdir():
        if not each.name.startswith("."):
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    if before.exists():
        shutil.copytree(before, place, dirs_exist_ok=True)
    left.append(any(each.name.startswith(".") for each in found))
print(json.dumps([states, codes, left, [each.name for each in place.iterdir()]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks, and sends itself signals")
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("signal_number", [9, 15], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_ended_at_every_step(
    command: str, signal_number: int, replacing: bool, bundle: Path, archive: Path, tales_int8_bundle: Path, tmp_path: Path
) -> None:  # fmt: skip
    place, before = tmp_path / "place", tmp_path / "before"
    place.mkdir()
    if command == "pack":
        source, target, whole, old = bundle, "x.tar.gz", hashes(archive), hashlib.sha256(b"mine").hexdigest()
    else:
        source, target, whole, old = archive, "unpacked", hashes(bundle), hashes(tales_int8_bundle)
    if replacing:
        before.mkdir()
        if command == "pack":
            (before / target).write_bytes(b"mine")
        else:
            shutil.copytree(tales_int8_bundle, before / target)
        shutil.copytree(before, place, dirs_exist_ok=True)
    force = ["--force"] if replacing else []
    done = subprocess.run(
        [sys.executable, "-c", STEPS, place, str(signal_number), command, source, place / target, *force, "--quiet"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    states, codes, left, at_the_end = json.loads(done.stdout)
    assert len(codes) > 15, "hardly any step was found"
    allowed = [{target: whole}, {target: old} if replacing else {}]
    for step, state in enumerate(states[:-1], 1):
        assert state in allowed, f"at step {step}: {state}"
    assert states[-1] == {target: whole}
    assert at_the_end == [target], "what the killed ones left is still there"
    if signal_number == 15:  # which leaves something only where it cuts off the clearing up after a success
        assert not any(hidden for hidden, state in zip(left, states, strict=False) if state != {target: whole})
    assert set(codes[:-1]) == ({-9} if signal_number == 9 else {130})


def hashes(path: Path) -> Any:
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(content_of(path).items())}


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


def test_needs_the_standard_library_alone(bundle: Path, tmp_path: Path) -> None:
    absent = (*REFERENCES, *EXPORT_ONLY, "onnxruntime", "numpy", "tokenizers", "tqdm", "platformdirs")
    main = "from gpt2onnx.cli.main import main; main()"
    for command in (["pack", bundle, tmp_path / "x.tar.gz"], ["unpack", tmp_path / "x.tar.gz", tmp_path / "unpacked"]):
        status, _, err = run(main, *command, without=absent)
        assert (status, err) == (0, "")
    assert content_of(tmp_path / "unpacked") == content_of(bundle)
