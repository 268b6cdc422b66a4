"""Sweeps: grid, figures against PyTorch and by definition, files for pandas and browsers, resuming."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine
from support.golden import Golden
from support.isolated import COMMAND_LINE, EXPORT_ONLY, REFERENCES, run
from support.reference import Reference
from support.systems import posix
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.errors import OptionError, OutputError
from gpt2onnx.experiments import charts, grid, report, sweep
from gpt2onnx.experiments.energy.tracker import EnergyTracker
from gpt2onnx.experiments.metrics import distinct, repeated
from gpt2onnx.runtime.options import GenerationConfig

PROMPT = "Once upon a time"
HOSTILE = "The <script>document.title='owned'</script><img src=x onerror=alert(1)> & \"king\""
SMALL = """
[options]
max_new_tokens = 8
seed = 3

[[strategy]]
name = "greedy"

[[strategy]]
name = "beam search"
num_beams = [2, 4]

[[strategy]]
name = "top-p"
top_p = [0.5, 0.9]

[[strategy]]
name = "several"
do_sample = true
num_return_sequences = 2
"""
Record = dict[str, Any]
TIMED = ("seconds", "tokens_per_second", "energy", "emissions")


@pytest.fixture
def small_grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(SMALL)
    return path


def make(model: gpt2onnx.Model, grid_file: Path, *prompts: str) -> sweep.Sweep:
    return sweep.Sweep(model, prompts, grid.load(grid_file, model.generation_config).strategies)


def untimed(records: Sequence[Record]) -> list[Record]:
    return [{name: value for name, value in record.items() if name not in TIMED} for record in records]


# The grid


def test_the_built_in_grid_is_that_of_the_notebooks() -> None:
    strategies = grid.load(None, GenerationConfig()).strategies
    found = Counter(
        (one.options.num_beams, one.options.no_repeat_ngram_size, *drawn(one.options)) for one in strategies
    )
    still = (None, None, None)
    expected = [(1, 0, *still)]
    expected += [(beams, 0, *still) for beams in (2, 6, 14)]
    expected += [(beams, size, *still) for beams, size in product((1, 2, 6, 14), (2, 4, 8))]
    expected += [(1, 0, temperature, 0, 1.0) for temperature in (0.5, 1.0, 1.5)]
    expected += [(1, 0, temperature, k, 1.0) for temperature, k in product((0.5, 1.0, 1.5), (50, 30, 20))]
    expected += [(1, 0, 1.0, k, 1.0) for k in (1, 50, 500)]
    expected += [(1, 0, 1.0, 0, p) for p in (0.95, 0.75, 0.5)]
    assert found == Counter(expected)
    assert len({one.label for one in strategies}) == len(strategies) == 34


def drawn(options: GenerationConfig) -> tuple[float | None, int | None, float | None]:
    return (options.temperature, options.top_k, options.top_p) if options.do_sample else (None, None, None)


def test_lists_multiply(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        "[options]\nseed = [1, 2]\nmax_new_tokens = 5\nstop = ['.', '!']\n"
        "[[strategy]]\nname = 'a'\ntop_k = [5, 10]\ntemperature = [0.5, 1.0]\n"
        "[[strategy]]\nname = 'b'\nnum_beams = [2, 3]\nstop = ['x']\n"
    )
    strategies = grid.load(path, GenerationConfig()).strategies
    sampled = [one.options for one in strategies if one.family == "a"]
    assert {(one.seed, one.top_k, one.temperature) for one in sampled} == set(product((1, 2), (5, 10), (0.5, 1.0)))
    assert all(one.do_sample and one.stop == [".", "!"] for one in sampled)
    # A seed changes nothing where nothing is drawn.
    beams = [one.options for one in strategies if one.family == "b"]
    assert [(one.num_beams, one.do_sample, one.stop, one.seed) for one in beams] == [
        (2, False, ["x"], None),
        (3, False, ["x"], None),
    ]
    assert [one.label for one in strategies][-2:] == ["b: beams 2", "b: beams 3"]
    overridden = grid.load(path, GenerationConfig(), {"seed": 9, "max_new_tokens": None}).strategies
    assert {one.options.seed for one in overridden} == {9, None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[strategy]]\nname = 'a'\ntemprature = 1.0", "strategy 'a': unknown generation option 'temprature'"),
        ("[[strategy]]\nname = 'a'\nnum_beams = ['2']", "strategy 'a': num_beams must be a whole number"),
        ("[[strategy]]\nnum_beams = 2.5", "strategy 'strategy 1': num_beams must be a whole number"),
        ("[[strategy]]\ndo_sample = false\ntop_k = [1, 2]", "top_k has no effect with do_sample = false"),
        ("[[strategy]]\nnum_beams = 2\nnum_return_sequences = 3", "num_return_sequences 3 is more than num_beams 2"),
        ("[[strategy]]\nlogprobs = 2", "logprobs can't be swept"),
        ("[[strategy]]\ntop_k = []", "top_k is an empty list"),
        ("[[strategy]]\ntop_k = [5, 5]", "top_k lists a value twice"),
        ("[[strategy]]\nname = 'a'\ndo_sample = true\nseed = [1, 2]\n" * 2, "two strategies are called 'a: seed 1'"),
        ("[[strategy]]\nname = 'a'\n" * 2, "two strategies are called 'a'"),
        (f"[[strategy]]\ntop_k = {list(range(40))}\nseed = {list(range(40))}", "1,600 runs are more than 1000"),
        ("[[strategy]]\nname = 3", "the name of strategy 1 must be a text"),
        ("[options]\nseed = 1", "at least one strategy"),
        ("strategy = 3", "at least one strategy"),
        ("[[strategies]]\ntop_k = 3", "unknown key 'strategies'"),
        ("prompts = ['']\n[[strategy]]\ntop_k = 3", "prompts must be a list of texts"),
        ("options = 3\n[[strategy]]\ntop_k = 3", "options must be a table"),
        ("[[strategy]\ntop_k = 3", "is not TOML"),
    ],
)
def test_bad_grids(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=re.escape(message)) as error:
        grid.load(path, GenerationConfig())
    assert str(path) in str(error.value)


def test_a_bad_grid_is_one_line(command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("[[strategy]]\ntop_k = []")
    done = command_line("sweep", path, "-m", tales_bundle, "--prompt", "x", "--out", tmp_path / "out", "--no-energy")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert not (tmp_path / "out").exists()


def test_too_many_runs_are_refused(tales_model: gpt2onnx.Model) -> None:
    strategies = grid.load(None, GenerationConfig()).strategies
    with pytest.raises(OptionError, match="1,020 runs are more than 1000"):
        sweep.Sweep(tales_model, [f"prompt {index}" for index in range(30)], strategies)
    with pytest.raises(OptionError, match="twice"):
        sweep.Sweep(tales_model, ["a", "a"], strategies)


# The figures


@given(st.lists(st.lists(st.integers(0, 5), max_size=30), min_size=1, max_size=4), st.integers(1, 4))
def test_distinct_and_repeated_by_their_definitions(sequences: list[list[int]], size: int) -> None:
    texts = ["".join(map(str, tokens)) for tokens in sequences]
    found = [[text[begin : begin + size] for begin in range(max(0, len(text) - size + 1))] for text in texts]
    everything = [ngram for ngrams in found for ngram in ngrams]
    expected = len(Counter(everything)) / len(everything) if everything else None
    assert distinct(sequences, size) == pytest.approx(expected)
    # A repeated n-gram is one that stood in its text before.
    shares = [
        sum(ngram in ngrams[:index] for index, ngram in enumerate(ngrams)) / len(ngrams) for ngrams in found if ngrams
    ]
    assert repeated(sequences, size) == pytest.approx(sum(shares) / len(shares) if shares else None)


def test_texts_and_log_probabilities_are_those_of_transformers(
    tales_model: gpt2onnx.Model, tales_reference: Reference, golden: Golden, tmp_path: Path, small_grid: Path
) -> None:
    records = list(sweep.run(make(tales_model, small_grid, PROMPT), tmp_path))
    assert [record["strategy"] for record in records] == [
        "greedy", "beam search: beams 2", "beam search: beams 4", "top-p 0.5", "top-p 0.9", "several",
    ]  # fmt: skip
    names = ("do_sample", "num_beams", "top_p", "top_k", "num_return_sequences", "max_new_tokens")
    for record in records:
        options = {name: record["options"][name] for name in names}
        prompt, seed = record["prompt_ids"], record["options"]["seed"]
        expected = tales_reference.tokens(prompt, seed, **options)
        for sequence, tokens in zip(record["sequences"], expected, strict=True):
            assert_same_tokens(sequence["token_ids"], tokens, record["strategy"])

        def mean(prompt: list[int] = prompt, expected: list[list[int]] = expected) -> float:
            import torch

            logprobs = []
            for tokens in expected:
                logits = torch.from_numpy(tales_reference.live_logits(np.array(prompt + tokens))).double()
                following = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                logprobs += following[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
            return sum(logprobs) / len(logprobs)

        logprob = golden.answer(["mean", prompt, expected], mean)
        assert record["mean_logprob"] == pytest.approx(logprob, abs=1e-4), record["strategy"]
        assert record["completion_tokens"] == sum(map(len, expected))


def test_a_full_window_can_be_judged(tales_model: gpt2onnx.Model, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("[[strategy]]\nname = 'long'\nmax_new_tokens = 100000\nmin_new_tokens = 100000\n")
    context = tales_model.config.n_positions
    prompt = " the" * (context - 3)
    assert len(tales_model.tokenizer.encode(prompt)) == context - 3
    (record,) = sweep.run(make(tales_model, path, prompt), tmp_path)
    assert record["sequences"][0]["finish_reason"] == "context"
    total = len(record["prompt_ids"]) + record["completion_tokens"]
    assert total == context + 1
    with pytest.raises(gpt2onnx.errors.PromptError, match="context window"):
        tales_model.score([1, 2, 3], prompt=[100] * (context - 1))


# The files


@pytest.fixture(scope="module")
def finished(tales_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with energy over two prompts, one of them hostile."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grid.toml").write_text(SMALL + f"\n[[strategy]]\nname = '''<b>{HOSTILE}</b>'''\ntop_k = [2, 3]\n")
    model = gpt2onnx.load(tales_bundle, threads=1)
    tracker = EnergyTracker(country="FRA", seconds=0.02)
    records = list(sweep.run(make(model, folder / "grid.toml", PROMPT, HOSTILE), folder, tracker))
    sweep.write_files(records, folder)
    return folder


def load_records(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_pandas_reads_the_files_as_they_are(finished: Path) -> None:
    records = load_records(finished)
    assert len(records) == 2 * 8
    lines = pandas.read_json(finished / "results.jsonl", lines=True)
    summary = pandas.read_csv(finished / "summary.csv")
    emissions = pandas.read_csv(finished / "emissions.csv")
    assert len(lines) == len(summary) == len(emissions) == len(records)
    for table in (lines, summary, emissions):
        assert table["strategy"].tolist() == [record["strategy"] for record in records]
        assert table["completion_tokens"].tolist() == [record["completion_tokens"] for record in records]
    assert summary["prompt"].tolist() == lines["prompt"].tolist() == [PROMPT] * 8 + [HOSTILE] * 8
    assert summary["text"].tolist() == [record["sequences"][0]["text"] for record in records]
    assert summary["mean_logprob"].tolist() == [record["mean_logprob"] for record in records]
    assert emissions["run_id"].tolist() == [record["energy"]["run_id"] for record in records]
    assert set(emissions["country_iso_code"]) == {"FRA"}
    energy = (emissions["joules_per_token"] * emissions["completion_tokens"] * emissions["runs"]).tolist()
    assert energy == pytest.approx((emissions["energy_consumed"] * 3.6e6).tolist())
    assert summary["joules_per_token"].tolist() == emissions["joules_per_token"].tolist()


class Page(HTMLParser):
    """Elements of a page, and whether they are closed in order."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def test_the_report_is_one_whole_page(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page, records = Page(text), load_records(finished)
    assert text.startswith("<!DOCTYPE html>")
    assert Counter(tag for tag, _ in page.elements)["h4"] == len(records)
    assert page.texts["h4"] == [record["strategy"] for record in records]
    for record in records:
        for sequence in record["sequences"]:
            assert sequence["text"].lstrip(" ") in page.texts["p"]
    assert [prompt for prompt in page.texts["p"] if prompt in (PROMPT, HOSTILE)] == [PROMPT, HOSTILE]
    # Nothing from elsewhere, nothing that runs.
    tags = {tag for tag, _ in page.elements}
    assert tags & {"script", "img", "link", "iframe", "object", "embed", "base", "b"} <= {"b"}
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "action", "data", "srcset"}, tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "url(" not in text
    assert "@import" not in text
    assert not re.findall(r"https?://", text)
    (policy,) = [one["content"] for _, one in page.elements if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_report_can_be_read_aloud(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    elements = page.elements
    ids = {attributes["id"] for _, attributes in elements if "id" in attributes}
    assert dict(elements)["html"] == {"lang": "en"}
    drawings = [attributes for tag, attributes in elements if tag == "svg" and "aria-hidden" not in attributes]
    assert len(drawings) == 3
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert set((drawing["aria-labelledby"] or "").split()) <= ids
    assert all(len(text) > 40 for text in page.texts["desc"])
    heads = [attributes.get("scope") for tag, attributes in elements if tag == "th"]
    assert set(heads) == {"col", "row", "rowgroup"}
    assert Counter(tag for tag, _ in elements)["caption"] == Counter(tag for tag, _ in elements)["table"] == 2
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_the_report_tells_of_runs_that_were_disturbed(finished: Path) -> None:
    records = load_records(finished)
    for share, said in ((1.0, False), (0.5, True)):
        for record in records:
            record["emissions"]["cpu_seconds"] = share * record["emissions"]["seconds"]
        assert (f"In {len(records)} of the runs other programs took" in report.render(records)) == said


def test_the_same_results_make_the_same_files(finished: Path, tmp_path: Path) -> None:
    code = (
        "import json\nfrom pathlib import Path\nfrom gpt2onnx.experiments import sweep\n"
        "records = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]\n"
        "sweep.write_files(records, Path(sys.argv[2]))"
    )
    for seed in "12":
        assert run(code, finished / "results.jsonl", tmp_path, PYTHONHASHSEED=seed) == (0, "", "")
        for name in ("report.html", "summary.csv", "emissions.csv"):
            assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name


def test_the_same_seed_makes_the_same_results(tales_model: gpt2onnx.Model, small_grid: Path, tmp_path: Path) -> None:
    plan = make(tales_model, small_grid, PROMPT, "One day")
    first, second = (list(sweep.run(plan, tmp_path / name)) for name in ("first", "second"))
    assert untimed(first) == untimed(second)
    # Time apart, the page is the same, too.
    timed = [{name: record[name] for name in TIMED} for record in first]
    assert report.render([one | two for one, two in zip(second, timed, strict=True)]) == report.render(first)


def test_a_report_of_little_is_still_a_page(tales_model: gpt2onnx.Model, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("[[strategy]]\nmax_new_tokens = 1\n")
    records = list(sweep.run(make(tales_model, path, PROMPT), tmp_path))
    assert (records[0]["distinct_2"], records[0]["repeated_4gram_share"]) == (None, None)
    sweep.write_files(records, tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert any("Energy was not measured" in text for text in page.texts["p"])
    assert not (tmp_path / "emissions.csv").exists()
    assert pandas.read_csv(tmp_path / "summary.csv")["joules_per_token"].isna().all()


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=9), st.booleans())
def test_axes_hold_their_values_and_have_round_ticks(values: list[float], zero: bool) -> None:
    for axis in (charts.horizontal("x", values, zero=zero), charts.vertical("y", values, zero=zero)):
        low, high = sorted((axis.begin, axis.end))
        for place in [axis.at(value) for value in values] + [tick.at for tick in axis.ticks]:
            assert low - 0.01 <= place <= high + 0.01
        assert 1 <= len(axis.ticks) <= 7
        assert len({tick.label for tick in axis.ticks}) == len(axis.ticks), axis.ticks


# Interruption


def test_resumed_after_a_torn_line(tales_model: gpt2onnx.Model, small_grid: Path, tmp_path: Path) -> None:
    plan = make(tales_model, small_grid, PROMPT)
    whole = list(sweep.run(plan, tmp_path / "whole"))
    tracker = EnergyTracker(seconds=0)
    begun = sweep.run(plan, tmp_path / "begun", tracker)
    first = [next(begun), next(begun)]
    begun.close()  # type: ignore[attr-defined]
    path = tmp_path / "begun" / "results.jsonl"
    with path.open("ab") as file:
        file.write(b'{"key": "123", "pro')
    resumed = list(sweep.run(plan, tmp_path / "begun", tracker, resume=True))
    assert resumed[:2] == first
    sweep.write_files(resumed, tmp_path / "begun")
    assert len(set(pandas.read_csv(tmp_path / "begun" / "emissions.csv")["run_id"])) == len(plan)
    assert untimed(resumed) == untimed(whole)
    assert load_records(tmp_path / "begun") == resumed
    # Once more, there is nothing left to do.
    before = path.stat().st_mtime_ns
    assert list(sweep.run(plan, tmp_path / "begun", resume=True)) == resumed
    assert path.stat().st_mtime_ns == before


def test_results_of_another_sweep_are_refused(
    tales_model: gpt2onnx.Model, make_checkpoint: MakeCheckpoint, small_grid: Path, tmp_path: Path
) -> None:
    plan = make(tales_model, small_grid, PROMPT)
    list(sweep.run(plan, tmp_path))
    before = (tmp_path / "results.jsonl").read_bytes()
    longer = tmp_path / "longer.toml"
    longer.write_text(SMALL.replace("max_new_tokens = 8", "max_new_tokens = 9"))
    shorter = tmp_path / "shorter.toml"
    shorter.write_text("\n".join(SMALL.splitlines()[:8]))
    # The same in all but the weights.
    folders = [
        gpt2onnx.export(make_checkpoint(weights_seed=seed), tmp_path / str(seed), parity=False).folder
        for seed in (0, 1)
    ]
    one, two = (make(gpt2onnx.load(folder, threads=1), small_grid, PROMPT) for folder in folders)
    assert not {one.key(*run) for run in one.runs()} & {two.key(*run) for run in two.runs()}
    others = [
        make(tales_model, small_grid, "Another prompt"),
        make(tales_model, longer, PROMPT),
        make(tales_model, shorter, PROMPT),
        make(gpt2onnx.load(tales_model.bundle.folder, threads=2), small_grid, PROMPT),
    ]
    for other in others:
        with pytest.raises(OutputError, match="results of another sweep"):
            list(sweep.run(other, tmp_path, resume=True))
    assert (tmp_path / "results.jsonl").read_bytes() == before


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


@posix
def test_killed_interrupted_and_resumed(tales_bundle: Path, tales_model: gpt2onnx.Model, tmp_path: Path) -> None:
    out, grid_file = tmp_path / "out", tmp_path / "grid.toml"
    grid_file.write_text(
        "[options]\nmax_new_tokens = 60\n[[strategy]]\nname = 'beams'\nnum_beams = [2,3,4,5,6,7,8,9,10]\n"
    )
    command = [
        sys.executable, "-m", "gpt2onnx", "sweep", str(grid_file), "-m", str(tales_bundle), "--prompt", PROMPT,
        "--prompt", "One day", "--out", str(out), "--resume", "--no-energy", "--threads", "1",
    ]  # fmt: skip
    results = out / "results.jsonl"

    def lines() -> int:
        return results.read_bytes().count(b"\n") if results.exists() else 0

    for signal_, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        before = lines()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        until(lambda before=before: lines() >= before + 3)
        process.send_signal(signal_)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
    assert err.strip() == b"gpt2onnx: interrupted"
    # The finished runs are kept, and can be looked at.
    assert before < lines() < 18
    assert len(Page((out / "report.html").read_text()).texts["h4"]) == lines()
    assert len(pandas.read_csv(out / "summary.csv")) == lines()
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    expected = list(sweep.run(make(tales_model, grid_file, PROMPT, "One day"), tmp_path / "whole"))
    assert untimed(load_records(out)) == untimed(expected)
    assert len(pandas.read_csv(out / "summary.csv")) == 18


# The command


def test_the_command(command_line: CommandLine, tales_bundle: Path, small_grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["sweep", small_grid, "-m", tales_bundle, "--threads", 1, "--out", out, "--no-energy", "-q"]
    assert "--prompt" in command_line(*command).err
    command += ["--prompt", PROMPT]
    done = command_line(*command)
    assert (done.code, done.err) == (0, "")
    records = load_records(out)
    assert all(record["strategy"] in done.out and record["energy"] is None for record in records)
    again = command_line(*command)
    assert (again.code, again.out) == (1, "")
    assert "--resume continues it" in again.err
    page = (out / "report.html").read_bytes()
    resumed = command_line(*command, "--resume", "--json")
    assert (resumed.code, resumed.err) == (0, "")
    assert json.loads(resumed.out) == [sweep.summary(record) for record in records]
    assert (out / "report.html").read_bytes() == page
    forced = command_line(*command, "--force", "--seed", 4, "--max-new-tokens", 5)
    assert forced.code == 0
    changed = load_records(out)
    assert {record["options"]["max_new_tokens"] for record in changed} == {5}
    assert {record["options"]["seed"] for record in changed} == {None, 4}
    for wrong in (["--resume", "--force"], ["--country", "FRA"]):
        assert command_line(*command, *wrong).code == 2
    printed = command_line("sweep", "--print-grid")
    assert (printed.code, printed.out) == (0, grid.built_in())


def test_a_prompt_in_the_grid(command_line: CommandLine, tales_bundle: Path, small_grid: Path, tmp_path: Path) -> None:
    small_grid.write_text("prompts = ['One day', 'The old king']\n" + SMALL)
    done = command_line("sweep", small_grid, "-m", tales_bundle, "--out", tmp_path / "out", "--no-energy", "--json")
    assert [row["prompt"] for row in json.loads(done.out)] == ["One day"] * 6 + ["The old king"] * 6


@pytest.fixture
def isolated(tales_bundle: Path, small_grid: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs the sweep where packages are missing: isolated(*options, without=names)."""
    command = ["sweep", small_grid, "-m", tales_bundle, "--prompt", PROMPT, "--threads", 1, "--out", tmp_path / "out"]
    return lambda *options, without: run(COMMAND_LINE, *command, *options, without=without)


def test_without_codecarbon_there_is_no_energy_and_a_note(
    isolated: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    absent = ("codecarbon", "pandas", *REFERENCES, *EXPORT_ONLY)
    status, out, err = isolated(without=absent)
    assert (status, "greedy" in out) == (0, True)
    assert "energy isn't measured: it needs pip install 'gpt2onnx[energy]'" in err
    assert all(record["energy"] is None for record in load_records(tmp_path / "out"))
    for asked in (["--energy"], ["--country", "FRA"]):
        status, out, err = isolated("--force", *asked, without=absent)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert "pip install 'gpt2onnx[energy]'" in err


def test_runs_without_pytorch_and_transformers(isolated: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, _, err = isolated("-q", "--energy-seconds", 0, without=(*REFERENCES, *EXPORT_ONLY))
    assert (status, err) == (0, "")
    assert all(record["energy"]["joules"] > 0 for record in load_records(tmp_path / "out"))


def test_the_report_needs_its_extra(isolated: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, out, err = isolated(without=("jinja2",))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "pip install 'gpt2onnx[sweep]'" in err
    assert not (tmp_path / "out").exists()


# The page in a browser

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PROBE = """
<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="found"></pre>
<script>
window.onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const box = element => element.getBoundingClientRect();
  const all = selector => [...page.querySelectorAll(selector)];
  document.querySelector("#found").textContent = JSON.stringify({{
    title: page.title,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    cards: all(".cards li").filter(card => box(card).width > 200 && box(card).height > 60).length,
    charts: all("figure > svg").filter(chart => box(chart).width > 250 && box(chart).height > 180).length,
    marks: all("figure > svg .mark").filter(mark => box(mark).width > 3).length,
    cut: all(".text, h1, h2, h4, .tiles b").filter(text => text.scrollWidth > text.clientWidth + 1).length,
    foreign: all("script, img").length,
  }});
}};
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_on_a_desk_and_on_a_phone(finished: Path, tmp_path: Path, width: int) -> None:
    records = load_records(finished)
    shutil.copy(finished / "report.html", tmp_path)
    (tmp_path / "probe.html").write_text(PROBE.format(width=width))
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom",
        (tmp_path / "probe.html").as_uri(),
    ]  # fmt: skip
    environment = os.environ | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=90, check=False, env=environment
    )
    found = re.search(r'<pre id="found">({.*?})</pre>', done.stdout)
    assert found is not None, done.stderr[-2000:]
    page = json.loads(found[1])
    assert page.pop("marks") > len({record["strategy"] for record in records})
    assert page == {
        "title": "Decoding strategies of tales",
        "overflow": 0,
        "cards": len(records),
        "charts": 3,
        "cut": 0,
        "foreign": 0,
    }
