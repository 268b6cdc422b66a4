"""Fleet: the same lines as on one machine, even if workers and machines die on the way."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import commands
from support.commands import CommandLine, start

import gpt2onnx
from gpt2onnx import fleet as _quiet_ray  # noqa: F401  # before Ray itself
from gpt2onnx.errors import BackendError, BundleError, OutputError, PromptError, install_command
from gpt2onnx.models.tales import FOLDER

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own imports
    import pyarrow
    import ray
    from pyarrow import fs, parquet
    from ray.cluster_utils import Cluster
    from ray.exceptions import OutOfDiskError

from gpt2onnx.fleet.bundle_copy import SharedBundle
from gpt2onnx.fleet.parts import Part, cut, encode
from gpt2onnx.fleet.run import ATTEMPTS, Summary, run
from gpt2onnx.fleet.worker import Work, carry_out
from gpt2onnx.runtime.options import GenerationConfig
from gpt2onnx.runtime.text import text_input

pytestmark = pytest.mark.system

Record = dict[str, Any]
PART = 8
STORE = 80 << 20  # the least that Ray takes
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A request file with strategies, seeds, bad lines, empty lines, other line ends and broken UTF-8."""
    draw = random.Random(1)
    words = ["king", "tailor", "old woman", "brook", "cat"]
    strategies: list[Record] = [
        {}, {"num_beams": 3}, {"do_sample": True, "seed": 7}, {"do_sample": True, "top_p": 0.8, "seed": 1}, {"logprobs": 2},
        {"max_new_tokens": 3}, {"stop": ["the"]}, {"temperature": -1}, {"temperature": 0.8, "seed": 2}, {"prompt": None, "prompt_ids": [5, 262, 99]},
    ]  # fmt: skip
    lines = []
    for index in range(98):
        request = {"id": index, "prompt": f"The {draw.choice(words)} and the {draw.choice(words)}"}
        lines.append(json.dumps(request | draw.choice(strategies)).encode())
    lines[3] = b'{"id": 3, "prompt": "The'
    lines[17] = lines[90] = b""
    lines[20] = b'{"id": "\xff", "prompt": "The \xff king"}'
    lines[21] = b'{"id": [21], "prompt": "half a pair: \\ud800"}\r'
    lines[40] = b"   "
    path = tmp_path_factory.mktemp("fleet") / "requests.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.fixture(scope="module")
def expected(tales_bundle: Path, requests: Path) -> list[Record]:
    """Results of one machine."""
    options = ["--threads", 1, "--batch-size", 4, "--max-new-tokens", NEW_TOKENS, "--input", requests]
    done = commands.run("generate", "-m", tales_bundle, *options)
    assert done.code == 0, done.err
    return [_timeless(json.loads(line)) for line in done.out.splitlines()]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with one core, which this process has joined. Tests add machines."""
    if sys.platform != "linux":
        pytest.skip("workers are looked for in /proc")
    made = None
    for _ in range(4):  # Ray gives its own start 30 seconds, which isn't enough beside much other work
        with contextlib.suppress(Exception):
            made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
            break
    assert made is not None, "no cluster of Ray has started, four times"
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.CRITICAL)
    yield made
    ray.shutdown()
    made.shutdown()


def _timeless(record: Record) -> Record:
    return {name: value for name, value in record.items() if name != "seconds"}


def _lines(folder: Path) -> list[Record]:
    """All results, in the order of their files' names."""
    parts = sorted(folder.glob("part-*"))
    return [_timeless(json.loads(line)) for part in parts for line in part.read_bytes().splitlines()]


def _work(format: Any = "jsonl", **options: Any) -> Work:  # noqa: A002
    defaults = GenerationConfig.from_file_content(json.loads((FOLDER / "generation_config.json").read_text()))
    return Work(defaults.merged({"max_new_tokens": NEW_TOKENS} | options), 4, format, "cpu", 1)


def _run(bundle: Path, requests: Path, output: Path, workers: int, **given: Any) -> Summary:
    work = given.pop("work", _work())
    return run(
        bundle, str(requests), str(output), work, workers=workers, part_size=given.pop("part_size", PART), **given
    )


def _without_file_name(record: Record) -> Record:
    """A record whose error names a line of whichever file."""
    return record | {"error": re.sub(r"^\S+, line", "line", record["error"])} if "error" in record else record


def _assert_same(actual: list[Record], expected: list[Record]) -> None:
    """Compares all but log probabilities exactly; those round with the batch."""
    for index, (one, other) in enumerate(zip(actual, expected, strict=False)):
        (texts, numbers), (other_texts, other_numbers) = _without_logprobs(one), _without_logprobs(other)
        assert texts == other_texts, f"result {index}"
        assert numbers == pytest.approx(other_numbers, abs=1e-4), f"result {index}"
    assert len(actual) == len(expected)


def _without_logprobs(record: Record) -> tuple[Record, list[float]]:
    """A result without log probabilities and scores, and those values."""
    numbers: list[float] = []
    rest = json.loads(json.dumps(record))
    for token in (token for sequence in rest.get("sequences", ()) for token in sequence["logprobs"] or ()):
        numbers += [token.pop("logprob"), token.pop("processed_logprob"), *(pair.pop() for pair in token["top"])]
    numbers += [sequence.pop("score") or 0.0 for sequence in rest.get("sequences", ())]
    return rest, numbers


def _when(count: int, act: Callable[[], None]) -> Callable[[int, int], None]:
    """Progress that acts once `count` parts are written."""
    parts = 0

    def progress(requests: int, tokens: int) -> None:
        nonlocal parts
        parts += 1
        if parts == count:
            act()

    return progress


def _workers() -> list[int]:
    """Processes that run a part for this process: grandchildren, named by Ray after the task."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                named = (entry / "cmdline").read_bytes().startswith(b"ray::carry_out")
                if named and _parent(_parent(int(entry.name))) == os.getpid():
                    found.append(int(entry.name))
            except OSError:  # it has just ended
                continue
    return found


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


# Without a cluster.


def test_a_part_depends_on_nothing_but_its_lines(tales_int8_bundle: Path, requests: Path) -> None:
    """Not on the parts that the worker had before; in int8, too, where sums of other shapes round otherwise."""
    bundle = SharedBundle.share(tales_int8_bundle, elsewhere=False)
    with requests.open("rb") as file:
        parts = [part for _, part in cut(text_input.lines(file, requests.name), 0, PART)][:6]
    orders = [list(range(6)), [5, 4, 3, 2, 1, 0], [2, 2, 5, 0, 3, 1, 4]]
    results = []
    for order in orders:
        done = {}
        for index in order:
            content = carry_out(bundle, _work(), Part(0, index), parts[index], None).content or b""
            done[index] = [_timeless(json.loads(line)) for line in content.splitlines()]
        results.append([done[index] for index in range(6)])
    for index in range(6):
        for other in results[1:]:
            _assert_same(other[index], results[0][index])


def test_parts_are_cut_by_requests() -> None:
    lines = text_input.lines(io.BytesIO(b"a\n\nb\r\n  \nc\rd\ne"), "requests")
    cuts = list(cut(lines, 3, 2))
    assert cuts == [(Part(3, 0), ["a", "b"]), (Part(3, 2), ["c", "d"]), (Part(3, 4), ["e"])]
    names = [part.name("jsonl") for part, _ in cuts]
    assert names == sorted(names)
    assert [Part.named(name) for name in names] == [part for part, _ in cuts]
    assert Part.named("part-1.jsonl") is None


def _in_utf8(records: list[Record]) -> list[Record]:
    """With halves of surrogate pairs replaced, which Parquet can't hold."""
    text = json.dumps(records, ensure_ascii=False).encode("utf-8", "replace").decode()
    assert "half a pair: ?" in text
    return json.loads(text)


def _from_parquet(table: pyarrow.Table) -> list[Record]:
    """Result lines again, as far as a column of texts tells ids apart."""
    records: list[Record] = []
    for row in table.to_pylist():
        name = row["id"]
        record: Record = {"id": json.loads(name) if name is not None and name[0] in "[0123456789" else name}
        if row["error"] is not None:
            records.append({**record, "error": row["error"]})
            continue
        for sequence in row["sequences"]:
            for token in sequence["logprobs"] or ():
                token["top"] = [list(pair) for pair in token["top"]]
        records.append(
            record
            | {key: row[key] for key in ("prompt", "prompt_ids", "sequences", "seed", "request_hash", "usage")}
            | {"energy": None}
        )
    return records


def test_parquet_holds_what_a_line_holds(expected: list[Record]) -> None:
    given = next(one for one in expected if "seed" in one)
    large = [{**given, "seed": seed, "seconds": 0.5} for seed in (2**64 - 1, 2**64 + 7)]
    written = parquet.read_table(io.BytesIO(encode(Part(0, 0), large, "parquet")))
    assert written["seed"].to_pylist() == [2**64 - 1, 7], "the latter draws the same: seeds count modulo 2**32"
    table = parquet.read_table(io.BytesIO(encode(Part(0, 0), [{**one, "seconds": 0.5} for one in expected], "parquet")))
    assert table["index"].to_pylist() == list(range(len(expected)))
    _assert_same(_from_parquet(table), _in_utf8(expected))


def test_wrong_usage_is_said_at_once(command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "a"}\n')
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    held = tmp_path / "held"
    held.mkdir()
    (held / "_job.json").write_text("{}")
    job = ["generate", "-m", tales_bundle, "--engine", "ray"]
    for arguments, code, message in [
        (["generate", "--workers", 2], 2, "go with --engine ray"),
        ([*job, "--input", file], 2, "--input and --output"),
        ([*job, "--input", file, "--output", tmp_path / "o", "--energy", tmp_path / "e"], 2, "one machine"),
        ([*job, "--input", tmp_path / "none", "--output", tmp_path / "o"], 1, "can't read"),
        ([*job, "--input", "nope://x/y", "--output", tmp_path / "o"], 1, "can't read nope://x/y"),
        ([*job, "--input", "-", "--output", tmp_path / "o"], 2, "--input and --output, which are files"),
        ([*job, "--input", file, "--output", other], 1, "holds other files"),
        ([*job, "--input", file, "--output", held], 1, "--resume continues it, --force replaces it"),
        ([*job, "--input", file, "--output", held, "--resume"], 1, "different in its input"),
        ([*job, "--input", file, "--output", file], 1, "is a file"),
        ([*job, "--input", file, "--output", tmp_path / "o", "--device", "auto"], 1, "the device is cpu"),
        ([*job, "--input", file, "--output", tmp_path / "o", "--address", "ray://h:1"], 1, "ray job submit"),
        ([*job, "--input", file, "--output", tmp_path / "o", "--address", "127.0.0.1:1"], 1, "can't join the Ray cluster"),
        ([*job, "--input", file, "--output", tmp_path / "o", "--address", "here"], 1, "can't join the Ray cluster"),
    ]:  # fmt: skip
        finished = command_line(*arguments)
        assert finished.code == code, arguments
        assert message in finished.err
        assert finished.err.count("\n") == 1
    assert (other / "letter.txt").read_text() == "mine"
    assert not (tmp_path / "o").exists()


def test_options_hold_on_a_cluster_of_its_own(
    command_line: CommandLine, tales_model: gpt2onnx.Model, tales_bundle: Path, tmp_path: Path
) -> None:
    lines = "".join(f'{{"id": {n}, "prompt": "Zoë\'s day {n} was"}}\r\n' for n in range(5))
    (tmp_path / "in.jsonl").write_bytes(lines.encode("latin-1"))
    out = tmp_path / "out"
    done = command_line(
        "generate", "-m", tales_bundle, "--input", tmp_path / "in.jsonl", "--output", out, "--engine", "ray",
        "--workers", 2, "--part-size", 2, "--format", "parquet", "--batch-size", 5, "--threads", 1, "--num-beams", 3,
        "--max-new-tokens", 4, "--no-do-sample", "--encoding", "latin-1", "--fail-on-error", "--json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    summary = json.loads(done.out)
    assert (summary["parts"], summary["requests"], summary["tokens"]) == (3, 5, 20)
    job = json.loads((out / "_job.json").read_text())
    assert (job["part_size"], job["batch_size"], job["format"], job["parts"]) == (2, 5, "parquet", 3)
    table = pyarrow.concat_tables(parquet.read_table(part) for part in sorted(out.glob("part-*.parquet")))
    for index, row in enumerate(table.to_pylist()):
        expected = tales_model.generate(f"Zoë's day {index} was", num_beams=3, max_new_tokens=4, do_sample=False)
        assert row["sequences"][0]["token_ids"] == expected.sequences[0].token_ids


def test_without_ray_the_extra_is_named(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else find(name, *more))
    for name in [name for name in sys.modules if name.startswith("gpt2onnx.fleet")]:
        monkeypatch.delitem(sys.modules, name)
    finished = command_line("generate", "--input", tmp_path / "i", "--output", tmp_path / "o", "--engine", "ray")
    assert finished.code == 1
    assert install_command("ray") in finished.err


# With one.


def test_bundle_reaches_machines_that_do_not_see_it(
    cluster: Cluster, tales_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2ONNX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "bundle"
    shutil.copytree(tales_bundle, folder)
    shared = SharedBundle.share(folder, elsewhere=True)
    assert shared.here() == folder
    folder.rename(tmp_path / "gone")
    mask = os.umask(0)  # nothing may depend on it: a cache that others can write to would be refused from now on
    try:
        copy = shared.here()
    finally:
        os.umask(mask)
    assert copy.is_relative_to(tmp_path / "cache")
    assert gpt2onnx.load(copy, threads=1).generate("The cat", max_new_tokens=2).text
    weights = copy / "onnx" / "model.onnx_data"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    copy = shared.here()
    gpt2onnx.load(copy, verify=True, threads=1)
    (tmp_path / "gone" / "onnx" / "model.onnx_data").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx_data"):
        SharedBundle.share(tmp_path / "gone", elsewhere=True)

    def full(content: object) -> None:
        raise OutOfDiskError

    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(BackendError, match="doesn't fit into Ray's object store"):
        SharedBundle.share(tales_bundle, elsewhere=True)


def test_a_part_that_kills_every_worker_ends_the_job(
    cluster: Cluster, tales_bundle: Path, requests: Path, tmp_path: Path
) -> None:
    killed = set[int]()
    ended = threading.Event()

    def kill_all() -> None:
        while not ended.wait(0.02):
            for process in set(_workers()) - killed:
                os.kill(process, signal.SIGKILL)
                killed.add(process)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(BackendError, match=f"{ATTEMPTS} workers died over part-00000-000000000000"):
            _run(tales_bundle, requests, tmp_path, workers=1)
    finally:
        ended.set()
        killer.join()
    assert len(killed) == ATTEMPTS


def test_one_worker_and_a_killed_one(
    cluster: Cluster, tales_bundle: Path, requests: Path, expected: list[Record], tmp_path: Path
) -> None:
    killed = []

    def kill() -> None:
        while not killed:
            killed.extend(_workers())
        os.kill(killed[0], signal.SIGKILL)

    summary = _run(tales_bundle, requests, tmp_path, workers=1, progress=_when(3, kill))
    assert len(killed) == 1
    _assert_same(_lines(tmp_path), expected)
    errors = sum("error" in record for record in expected)
    tokens = sum(record["usage"]["completion_tokens"] for record in expected if "usage" in record)
    assert summary == Summary(-(-len(expected) // PART), 0, len(expected), errors, tokens)
    assert errors >= 3
    # Done is done; and other work isn't taken for it.
    assert _run(tales_bundle, requests, tmp_path, workers=1, resume=True) == Summary(kept=summary.parts)
    with pytest.raises(OutputError, match="different in its options"):
        _run(tales_bundle, requests, tmp_path, workers=1, resume=True, work=_work(num_beams=2))


def test_three_workers_and_a_lost_machine(
    cluster: Cluster, tales_bundle: Path, requests: Path, expected: list[Record], tmp_path: Path
) -> None:
    """Its two workers, and their parts, are lost; the machine that is left has room for one."""
    machine = cluster.add_node(num_cpus=2, object_store_memory=STORE)
    seen: list[int] = []

    def lose() -> None:
        while len(set(seen)) < 2:
            seen.extend(_workers())
        cluster.remove_node(machine, allow_graceful=False)

    _run(tales_bundle, requests, tmp_path, workers=3, progress=_when(4, lose))
    assert len(set(seen)) >= 2
    _assert_same(_lines(tmp_path), expected)


def test_object_storage(
    cluster: Cluster, tales_bundle: Path, requests: Path, expected: list[Record], tmp_path: Path
) -> None:
    """An S3 server on this machine: a folder of two files, one of them compressed, of which half the parts are kept."""
    pytest.importorskip("moto", reason="the S3 server of the tests isn't installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        where = f"?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1&allow_bucket_creation=true"
        storage, _ = fs.FileSystem.from_uri(f"s3://key:secret@jobs{where}")
        deadline = time.monotonic() + 60
        while True:
            try:
                storage.create_dir("jobs/in")
                break
            except OSError:
                assert time.monotonic() < deadline, "the S3 server doesn't start"
        for name, content in [("a.jsonl", requests.read_bytes()), ("b.jsonl.gz", gzip.compress(requests.read_bytes()))]:
            with storage.open_output_stream(f"jobs/in/{name}", compression=None) as file:
                file.write(content)
        places = [f"s3://key:secret@jobs/{folder}{where}" for folder in ("in", "out")]
        summary = run(tales_bundle, *places, _work(), workers=1, part_size=32)
        parts = [one.path for one in storage.get_file_info(fs.FileSelector("jobs/out")) if "part-" in one.path]
        assert len(parts) == summary.parts == 2 * -(-len(expected) // 32)
        lost = sorted(parts)[::3]
        for path in lost:
            storage.delete_file(path)
        assert run(tales_bundle, *places, _work(), workers=1, resume=True).parts == len(lost)
        lines = b"".join(storage.open_input_stream(path).read() for path in sorted(parts)).splitlines()
        found = [_timeless(json.loads(line)) for line in lines]
        _assert_same([_without_file_name(each) for each in found], [_without_file_name(each) for each in expected * 2])
        with pytest.raises(PromptError, match="can't read s3://jobs/none: ") as error:
            run(tales_bundle, f"s3://key:secret@jobs/none{where}", str(tmp_path / "o"), _work())
        assert "secret" not in str(error.value)
    finally:
        server.kill()
        server.wait()


def test_interrupted_killed_and_resumed(
    cluster: Cluster, tales_bundle: Path, requests: Path, expected: list[Record], tmp_path: Path
) -> None:
    command = [
        "generate", "-m", tales_bundle, "--batch-size", 4, "--max-new-tokens", NEW_TOKENS, "--input", requests, "--output", tmp_path,
        "--engine", "ray", "--workers", 1, "--part-size", PART, "--resume", "--address", cluster.address,
    ]  # fmt: skip
    for signal_, wanted in [(signal.SIGINT, 2), (signal.SIGKILL, 5)]:
        process = start(*command)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and len(list(tmp_path.glob("part-*"))) < wanted:
            time.sleep(0.005)
        process.send_signal(signal_)
        _, err = process.communicate(timeout=60)
        if signal_ == signal.SIGINT:
            assert (process.returncode, err.strip()) == (130, "gpt2onnx: interrupted")
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    assert wanted <= len(done) < len(expected) // PART, "the job was done before it could be killed"
    mine = tmp_path / ".letter.0123abcd.new"
    for name in (".part-00000-000000000096.jsonl.0123abcd.new", "._job.json.0123abcd.new", mine.name):
        (tmp_path / name).write_text('{"id": 96, "pro')  # as if their writes had been cut off
    summary = _run(tales_bundle, requests, tmp_path, workers=1, resume=True, part_size=None)
    assert summary.kept == len(done)
    _assert_same(_lines(tmp_path), expected)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in done} == done
    assert list(tmp_path.glob(".*")) == [mine]
