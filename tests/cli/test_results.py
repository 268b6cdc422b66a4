"""Results of request files: kept where they fit, computed anew where they don't, lost never."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import CommandLine, Finished, run, start, wait_until
from support.systems import posix

import gpt2onnx
from gpt2onnx.cli.results import Results
from gpt2onnx.errors import OutputError
from gpt2onnx.models.bundle import TOKENIZER, TOKENIZER_CONFIG

Request = dict[str, Any]
REQUESTS: list[Request] = [
    {"id": index, "prompt": prompt} | options
    for index, (prompt, options) in enumerate(
        [
            ("Once upon a time", {}), ("The king", {"seed": 5}), ("The queen", {"num_beams": 2}), ("The king", {"logprobs": 1}),
            ("One day", {"do_sample": True}), ("One day", {"do_sample": True}), ("At last", {"stop": ["."]}),
        ]
    )
]  # fmt: skip


class Job:
    """A job whose input and options change between runs."""

    def __init__(self, command_line: CommandLine, bundle: Path, folder: Path) -> None:
        self._command_line, self.bundle = command_line, bundle
        self.input, self.output = folder / "requests.jsonl", folder / "results.jsonl"

    def run(self, requests: list[Request | str], *options: object) -> Finished:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in requests]
        self.input.write_text("".join(f"{line}\n" for line in lines))
        files = ("--input", self.input, "--output", self.output)
        return self._command_line("generate", "-m", self.bundle, "--max-new-tokens", 6, *files, *options)

    @property
    def lines(self) -> list[str]:
        """The results as they stand in the file: what isn't computed anew is the same to the microsecond."""
        return self.output.read_text().splitlines(keepends=True)

    @property
    def ids(self) -> list[Any]:
        return [json.loads(line)["id"] for line in self.lines]


@pytest.fixture
def new_job(command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> Job:
    """Without results."""
    return Job(command_line, tales_bundle, tmp_path)


@pytest.fixture(scope="module")
def results() -> list[bytes]:
    """Of the first test that asks for a job that has run."""
    return []


@pytest.fixture
def job(new_job: Job, results: list[bytes]) -> Job:
    """One that has run."""
    if results:
        new_job.output.write_bytes(results[0])
        return new_job
    done = new_job.run(REQUESTS)
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith(f"{len(REQUESTS)} done, 0 failed; ")
    assert done.err.endswith(f" tokens/s; results in {new_job.output}\n")
    assert len(new_job.lines) == len(REQUESTS)
    results.append(new_job.output.read_bytes())
    return new_job


def test_results_are_replaced_only_by_force(job: Job) -> None:
    before = job.lines
    done = job.run(REQUESTS)
    assert (done.code, done.out) == (1, "")
    assert "--resume continues it, --force replaces it" in done.err
    assert job.lines == before
    assert job.run(REQUESTS[:2], "--force").code == 0
    assert job.ids == [0, 1]
    assert not set(job.lines) & set(before), "computed anew"
    assert list(job.output.parent.glob(".*")) == []


@pytest.mark.parametrize("option", [[], ["--resume"], ["--force"]])
@pytest.mark.parametrize(
    "content",
    [
        b"buy milk\n", b"\nbuy milk\n", b"\0\xff" * 50_000, b'{"id": 1, "prompt": "mine"}\n', b'{"id": 1, "prompt": "mine"}',
        b'{"id": 1, "error": "no", "prompt": "mine"}\n', b"[]\n", b'{"sequence": []}\n',
    ],
)  # fmt: skip
def test_other_files_are_never_touched(content: bytes, option: list[str], new_job: Job) -> None:
    new_job.output.write_bytes(content)
    done = new_job.run(REQUESTS, *option)
    assert done.code == 1
    assert "doesn't hold results" in done.err
    assert new_job.output.read_bytes() == content


@pytest.mark.parametrize("option", [[], ["--resume"], ["--force"]])
def test_an_empty_file_is_taken(option: list[str], new_job: Job) -> None:
    new_job.output.write_text("")
    assert new_job.run(REQUESTS[:1], *option).code == 0
    assert new_job.ids == [0]


@posix
def test_a_second_job_on_the_same_output_is_refused(new_job: Job, tmp_path: Path) -> None:
    job, source = new_job, tmp_path / "pipe"
    os.mkfifo(source)
    options = ["--max-new-tokens", 6, "--batch-size", 1, "--input", source, "--output", job.output]
    first = start("generate", "-m", job.bundle, *options)
    with source.open("w") as requests:
        requests.write(json.dumps(REQUESTS[0]) + "\n")
        requests.flush()
        wait_until(lambda: job.output.exists() and bool(job.lines), 60)
        for option in ("--resume", "--force"):
            second = job.run(REQUESTS, option)
            assert second.code == 1
            assert "another job writes to" in second.err
        requests.write(json.dumps(REQUESTS[1]) + "\n")
    _, summary = first.communicate(timeout=60)
    assert summary.startswith("2 done, 0 failed")
    assert job.ids == [0, 1]
    assert job.run(REQUESTS, "--resume").code == 0


def test_a_second_job_is_refused_also_after_the_results_of_a_killed_one_were_joined(job: Job) -> None:
    beside = job.output.with_name(f".{job.output.name}.new")
    beside.write_text(job.lines[0])
    first = Results(job.output, resume=True)
    assert not beside.exists()
    with pytest.raises(OutputError, match="another job writes to"):
        Results(job.output, resume=True)
    first.close()
    Results(job.output, resume=True).close()


def test_half_a_line_is_written_again(job: Job) -> None:
    whole = job.lines
    for kept in (0, 3, len(whole) - 1):
        job.output.write_text("".join(whole[:kept]) + whole[kept][:20])
        done = job.run(REQUESTS, "--resume")
        assert job.lines[:kept] == whole[:kept]
        assert job.ids == list(range(len(REQUESTS)))
        assert f"{len(whole) - kept} done, 0 failed" in done.err
        assert (f"; {kept} kept, 0 computed anew; " in done.err) == (kept > 0)
    complete = job.output.read_bytes()
    assert f"0 done, 0 failed; {len(whole)} kept, 0 computed anew; results in" in job.run(REQUESTS, "--resume").err
    assert job.output.read_bytes() == complete


CHANGES: dict[str, tuple[Callable[[list[Request]], list[Request]], list[int]]] = {
    "another prompt": (lambda r: [*r[:2], r[2] | {"prompt": "The fox"}, *r[3:]], [0, 1, 3, 4, 5, 6]),
    "another option": (lambda r: [r[0], r[1] | {"seed": 6}, *r[2:]], [0, 2, 3, 4, 5, 6]),
    "another id": (lambda r: [r[0] | {"id": "new"}, *r[1:]], [1, 2, 3, 4, 5, 6]),
    "a further request": (lambda r: [*r[:3], {"id": 9, "prompt": "New"}, *r[3:]], list(range(7))),
    "one request less": (lambda r: r[:3] + r[4:], [0, 1, 2, 4, 5, 6]),
    "another order": (lambda r: r[::-1], list(range(7))),
    "the same, spelt otherwise": (lambda r: [{"num_beams": 1} | each for each in r], list(range(7))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_longer_fits_is_computed_anew(change: str, job: Job) -> None:
    alter, kept = CHANGES[change]
    before, requests = job.lines, alter(REQUESTS)
    done = job.run(requests, "--resume")
    assert done.code == 0
    assert job.ids == [each["id"] for each in requests]
    for request, line in zip(requests, job.lines, strict=True):
        assert (line in before) == (request["id"] in kept), request
    assert [line for line in before if line in job.lines] == [before[index] for index in kept]
    computed = len(requests) - len(kept)
    anew = min(computed, len(REQUESTS) - len(kept))
    assert done.err.startswith(f"{computed} done, 0 failed; {len(kept)} kept, {anew} computed anew; "), done.err
    assert list(job.output.parent.glob(".*")) == []


def test_options_of_the_command_and_the_model_count(
    job: Job, tales_int8_bundle: Path, tales_model: gpt2onnx.Model
) -> None:
    first = job.lines
    done = job.run(REQUESTS, "--resume", "--repetition-penalty", 1.5)
    assert f"0 kept, {len(first)} computed anew" in done.err
    expected = tales_model.generate("Once upon a time", max_new_tokens=6, repetition_penalty=1.5)
    assert json.loads(job.lines[0])["sequences"] == expected.to_dict()["sequences"]
    second, job.bundle = job.lines, tales_int8_bundle
    done = job.run(REQUESTS, "--resume", "--repetition-penalty", 1.5)
    assert f"0 kept, {len(first)} computed anew" in done.err
    assert not set(job.lines) & set(second)


def test_the_tokenizer_counts(job: Job, tmp_path: Path) -> None:
    """One of the same files is the same; one that numbers tokens in another way makes other results."""
    first, own = job.lines, tmp_path / "tokenizer"
    own.mkdir()
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        shutil.copy(job.bundle / name, own)
    assert f"{len(first)} kept" in job.run(REQUESTS, "--resume", "--tokenizer", own).err
    content = json.loads((own / TOKENIZER).read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (own / TOKENIZER).write_text(json.dumps(content), "utf-8")
    assert f"0 kept, {len(first)} computed anew" in job.run(REQUESTS, "--resume", "--tokenizer", own).err
    assert not set(job.lines) & set(first)


def test_equal_requests_keep_results_of_their_own(job: Job) -> None:
    twice: list[Request] = [{"prompt": "One day", "do_sample": True, "max_new_tokens": 20}] * 3
    assert job.run(twice, "--force").code == 0
    before = job.lines
    assert len({json.loads(line)["seed"] for line in before}) == 3
    assert job.run([{"id": 0, "prompt": "New"}, *twice], "--resume").code == 0
    assert job.lines[1:] == before


def test_errors_are_tried_again(job: Job) -> None:
    """What failed for want of memory may work now; what can't work fails again, and moves no other result."""
    whole = job.lines
    job.output.write_text("".join(['{"id": 0, "error": "not enough memory"}\n', *whole[1:]]))
    done = job.run(REQUESTS, "--resume")
    assert f"1 done, 0 failed; {len(whole) - 1} kept, 1 computed anew; " in done.err
    assert job.lines[1:] == whole[1:]
    assert json.loads(job.lines[0])["sequences"] == json.loads(whole[0])["sequences"]
    bad = ["{broken", '{"id": 8, "prompt_ids": ["a", [1], 2.5]}', '{"prompt": 5}', '{"id": 9, "prompt_ids": [-1]}']
    broken = [*REQUESTS[:3], *bad, *REQUESTS[3:]]
    assert job.run(broken, "--resume").code == 0
    before, written = job.output.read_bytes(), job.output.stat().st_ino
    done = job.run(broken, "--resume")
    assert f"0 done, 4 failed; {len(whole)} kept, 4 computed anew; results" in done.err
    assert (job.output.read_bytes(), job.output.stat().st_ino) == (before, written), "it stays where it is"


def test_results_without_a_hash_are_computed_anew(job: Job) -> None:
    """Those of earlier versions, and what isn't a result at all."""
    hashless = [
        {name: value for name, value in json.loads(line).items() if name != "request_hash"} for line in job.lines
    ]
    job.output.write_text(json.dumps(hashless[0]) + '\n[1]\n"a"\n{damaged\n\0\0\n' + job.lines[1])
    done = job.run(REQUESTS, "--resume")
    assert "; 1 kept, 5 computed anew; " in done.err
    assert job.ids == list(range(len(REQUESTS)))


def test_the_same_request_has_the_same_hash_everywhere(
    job: Job, command_line: CommandLine, tales_model: gpt2onnx.Model
) -> None:
    options = ["-m", job.bundle, "--max-new-tokens", 6, "--seed", 5, "--json"]
    hashes = [json.loads(line)["request_hash"] for line in job.lines]
    assert json.loads(command_line("generate", "The king", *options).out)["request_hash"] == hashes[1]
    assert tales_model.generate("The king", max_new_tokens=6, seed=5).request_hash == hashes[1]
    assert hashes[4] == hashes[5]
    assert len(set(hashes)) == len(hashes) - 1
    assert tales_model.generate("The king", max_new_tokens=6, seed=4).request_hash not in hashes


@posix
@pytest.mark.system
def test_killed_while_results_are_replaced(new_job: Job, tmp_path: Path) -> None:
    """Each result that was computed once is never computed again, and none of the earlier ones is lost before the end."""
    job = new_job
    many = [
        {"id": index, "prompt": f"Day {index}", "seed": index, "max_new_tokens": 6 if index < 40 else 40}
        for index in range(60)
    ]
    assert job.run(many[:40]).code == 0
    earlier = job.lines
    # Half of the earlier ones fit, in another order.
    wanted = [{**many[0], "seed": 99, "max_new_tokens": 40}, *many[39:19:-1], *many[40:], *many[1:20]]
    job.input.write_text("".join(json.dumps(each) + "\n" for each in wanted))
    command = [
        "generate", "-m", job.bundle, "--max-new-tokens", 6, "--input", job.input, "--output", job.output, "--batch-size", 2, "--resume",
    ]  # fmt: skip
    beside = tmp_path / ".results.jsonl.new"
    computed = dict[Any, str]()
    for lines in (3, 24, 30):
        process = start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (beside.read_bytes() if beside.exists() else b"").count(b"\n") < lines:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the job was done before it could be killed"
        assert set(earlier) <= set(job.lines), "an earlier result was lost"
        computed |= {
            json.loads(line)["id"]: line for line in beside.read_text().splitlines(keepends=True) if line.endswith("\n")
        }
    assert run(*command).code == 0
    assert job.ids == [each["id"] for each in wanted]
    final = dict(zip(job.ids, job.lines, strict=True))
    assert {name: final[name] for name in computed} == computed, "a result was computed twice"
    assert {name: final[name] for name in range(1, 40)} == dict(zip(range(1, 40), earlier[1:], strict=True))
    assert json.loads(final[0])["seed"] == 99
    assert list(tmp_path.glob(".*")) == []


def test_summary_and_exit_code(job: Job, command_line: CommandLine) -> None:
    bad: list[Request | str] = [*REQUESTS[:2], "{broken", {"id": 7, "prompt": "x", "top_q": 1}]
    done = job.run(bad, "--force")
    assert done.code == 0
    assert done.err.startswith("2 done, 2 failed; ")
    done = job.run(bad, "--resume", "--fail-on-error")
    assert done.code == 1
    assert done.err.splitlines()[1] == "gpt2onnx: 2 of 2 requests failed: their results have an error"
    assert len(job.lines) == 4
    quiet = job.run(bad, "--resume", "--fail-on-error", "-q")
    assert (quiet.code, quiet.err.count("\n")) == (1, 1)
    assert job.run(REQUESTS, "--force", "--fail-on-error").code == 0
    assert job.run(REQUESTS, "--force", "-q").err == ""
    lines = "".join(json.dumps(each) + "\n" for each in REQUESTS)
    done = command_line("generate", "-m", job.bundle, "--max-new-tokens", 6, "--input", "-", stdin=lines)
    assert done.err.endswith("results in standard output\n")
    assert [json.loads(line)["id"] for line in done.out.splitlines()] == list(range(len(REQUESTS)))


@posix
def test_any_id_comes_back_on_standard_output(command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> None:
    ids = ["[" * 600 + "]" * 600, '{"a": [null, 1e+300]}']
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(f'{{"id": {each}, "prompt": "One day"}}\n' for each in ids))
    done = command_line("generate", "-m", tales_bundle, "--max-new-tokens", 1, "--input", requests, "--json")
    assert [line.partition(', "prompt"')[0] for line in done.out.splitlines()] == [f'{{"id": {each}' for each in ids], (
        done.err
    )


def test_results_behind_a_link_and_in_a_pipe(job: Job, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere.jsonl"
    job.output.rename(place)
    job.output.symlink_to(place)
    assert job.run(REQUESTS[::-1], "--resume").code == 0
    assert job.output.is_symlink()
    assert [json.loads(line)["id"] for line in place.read_text().splitlines()] == [*range(len(REQUESTS))][::-1]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        job.output = pipe
        assert job.run(REQUESTS[:2]).code == 0
        out, _ = reader.communicate(timeout=60)
    assert [json.loads(line)["id"] for line in out.splitlines()] == [0, 1]
