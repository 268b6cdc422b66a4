"""Sweeps: grid, figures against PyTorch and by definition, resuming. Their files: test_report.py."""

import json
import re
import signal
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import MakeCheckpoint
from support.commands import CommandLine, start, wait_until
from support.golden import Golden
from support.isolated import COMMAND_LINE, EXPORT_ONLY, REFERENCES, run
from support.reference import Reference
from support.sweeps import PROMPT, SMALL, TIMED, load_records, make, untimed
from support.systems import posix
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.errors import OptionError, OutputError, install_command
from gpt2onnx.experiments import grid, report, sweep
from gpt2onnx.experiments.energy.tracker import EnergyTracker
from gpt2onnx.experiments.metrics import distinct, repeated
from gpt2onnx.runtime.options import GenerationConfig


@pytest.fixture
def small_grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(SMALL)
    return path


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


def test_strategies_beside_beams_and_sampling(tmp_path: Path) -> None:
    """top_k belongs to contrastive search where penalty_alpha is given; scales and groups multiply like all numbers."""
    path = tmp_path / "grid.toml"
    path.write_text(
        "[[strategy]]\nname = 'contrastive'\npenalty_alpha = 0.6\ntop_k = [4, 8]\n"
        "[[strategy]]\nname = 'guided'\nguidance_scale = [1.5, 3.0]\nnegative_prompt = 'Sadly'\n"
        "[[strategy]]\nname = 'diverse'\nnum_beams = 6\nnum_beam_groups = [2, 3]\ndiversity_penalty = 1.0\n"
    )
    strategies = grid.load(path, GenerationConfig()).strategies
    assert [(one.label, one.options.strategy) for one in strategies] == [
        ("contrastive: top-k 4", "contrastive search"),
        ("contrastive: top-k 8", "contrastive search"),
        ("guided: guidance_scale 1.5", "greedy"),
        ("guided: guidance_scale 3.0", "greedy"),
        ("diverse: num_beam_groups 2", "diverse beam search"),
        ("diverse: num_beam_groups 3", "diverse beam search"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[[strategy]]\nname = 'a'\ntemprature = 1.0",
            "strategy 'a': unknown generation option 'temprature': did you mean 'temperature'?",
        ),
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


def test_the_same_seed_makes_the_same_results(tales_model: gpt2onnx.Model, small_grid: Path, tmp_path: Path) -> None:
    plan = make(tales_model, small_grid, PROMPT, "One day")
    first, second = (list(sweep.run(plan, tmp_path / name)) for name in ("first", "second"))
    assert untimed(first) == untimed(second)
    # Time apart, the page is the same, too.
    timed = [{name: record[name] for name in TIMED} for record in first]
    assert report.render([one | two for one, two in zip(second, timed, strict=True)]) == report.render(first)


def test_repetitions_and_records_share_a_seed(tales_model: gpt2onnx.Model, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("[[strategy]]\nname = 'drawn'\ntemperature = 1.5\ntop_k = 0\nmax_new_tokens = 8\n")
    lengths = []
    answer = tales_model.answer

    def counting(*given: object) -> list[gpt2onnx.Result]:
        results = answer(*given)
        lengths.append(results[0].sequences[0].token_ids)
        return results

    tales_model.answer = counting  # type: ignore[method-assign]
    try:
        (record,) = sweep.run(make(tales_model, path, PROMPT), tmp_path / "out", EnergyTracker(seconds=0.05))
    finally:
        del tales_model.answer
    runs = lengths[1:]  # behind the warm-up
    assert len(runs) > 1
    assert all(tokens == record["sequences"][0]["token_ids"] for tokens in runs)
    seed = record["options"]["seed"]
    again = tales_model.generate(PROMPT, temperature=1.5, top_k=0, max_new_tokens=8, seed=seed)
    assert again.sequences[0].token_ids == runs[0]


def test_arguments_take_the_place_of_the_grids_options(tales_model: gpt2onnx.Model) -> None:
    given = {"top_p": [0.9, 0.5], "seed": 1, "max_new_tokens": 7}
    found = gpt2onnx.sweep(tales_model, PROMPT, grid=given, seed=9, max_new_tokens=3, energy=False)
    assert {(record["options"]["seed"], record["options"]["max_new_tokens"]) for record in found.records} == {(9, 3)}


def test_what_cannot_run_is_told_before_earlier_results_are_gone(
    tales_model: gpt2onnx.Model, small_grid: Path, tmp_path: Path
) -> None:
    records = list(sweep.run(make(tales_model, small_grid, PROMPT), tmp_path))
    sweep.write_files(records, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(gpt2onnx.errors.PromptError, match="context window"):
        list(sweep.run(make(tales_model, small_grid, PROMPT, " the" * 600), tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    path = tmp_path / "cut.toml"
    path.write_text("[options]\ntruncate = 'left'\n[[strategy]]\nname = 'cut'\nmax_new_tokens = 3\n")
    (record,) = sweep.run(make(tales_model, path, " the" * 600), tmp_path / "cut")
    assert record["completion_tokens"] == 3


def test_two_sweeps_do_not_share_a_folder(tales_model: gpt2onnx.Model, small_grid: Path, tmp_path: Path) -> None:
    plan = make(tales_model, small_grid, PROMPT)
    first = sweep.run(plan, tmp_path)
    next(first)
    with pytest.raises(OutputError, match="another sweep writes to"):
        next(sweep.run(plan, tmp_path))
    assert len([*first]) == len(plan) - 1


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


@posix
def test_finished_runs_of_an_interrupted_sweep_can_be_looked_at(tales_bundle: Path, tmp_path: Path) -> None:
    out, grid_file = tmp_path / "out", tmp_path / "grid.toml"
    grid_file.write_text(
        "[options]\nmax_new_tokens = 24\n[[strategy]]\nname = 'beams'\nnum_beams = [2,3,4,5,6,7,8,9,10]\n"
    )
    results = out / "results.jsonl"

    def lines() -> int:
        return results.read_bytes().count(b"\n") if results.exists() else 0

    options = ["--prompt", PROMPT, "--prompt", "One day", "--out", out, "--no-energy", "--threads", 1]
    process = start("sweep", grid_file, "-m", tales_bundle, *options)
    wait_until(lambda: lines() >= 3, seconds=60)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "gpt2onnx: interrupted")
    assert 3 <= lines() < 18
    cards = re.findall(r"<h4>(.*?)</h4>", (out / "report.html").read_text())
    assert "".join(cards).count("<span>") == lines()
    assert len(pandas.read_csv(out / "summary.csv")) == lines()


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
    assert "--resume (resume=True) continues it" in again.err
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
    assert "--print-grid prints TOML" in command_line("sweep", "--print-grid", "--json").err
    assert (printed.code, printed.out) == (0, grid.built_in())


def test_results_are_kept_before_any_model_is_loaded(command_line: CommandLine, tmp_path: Path) -> None:
    """The model isn't there, so a sweep that looked for it first would say that."""
    (tmp_path / "results.jsonl").write_text("{}\n")
    command = ("sweep", "-m", tmp_path / "no-model", "--prompt", PROMPT, "--no-energy", "--out", tmp_path)
    refused = command_line(*command)
    assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
    assert "results.jsonl exists: --resume (resume=True) continues it" in refused.err
    for option in ("--resume", "--force"):
        assert "no-model" in command_line(*command, option).err
    assert (tmp_path / "results.jsonl").read_text() == "{}\n"


def test_prompts_in_the_grid(command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        "prompts = ['One day', 'The old king']\n[[strategy]]\nmax_new_tokens = 2\nseed = [1, 2]\ntop_k = 9\n"
    )
    done = command_line("sweep", path, "-m", tales_bundle, "--out", tmp_path / "out", "--no-energy", "--json")
    assert [row["prompt"] for row in json.loads(done.out)] == ["One day"] * 2 + ["The old king"] * 2


@pytest.fixture
def one_strategy(tales_bundle: Path, tmp_path: Path) -> list[object]:
    """The command of a sweep of one strategy."""
    grid_file = tmp_path / "grid.toml"
    grid_file.write_text("[[strategy]]\nname = 'greedy'\nmax_new_tokens = 2\n")
    return ["sweep", grid_file, "-m", tales_bundle, "--prompt", PROMPT, "--threads", 1, "--out", tmp_path / "out"]


def test_without_codecarbon_there_is_no_energy_and_a_note(
    one_strategy: list[object], command_line: CommandLine, tmp_path: Path
) -> None:
    absent = ("codecarbon", "pandas", *REFERENCES, *EXPORT_ONLY)
    status, out, err = run(COMMAND_LINE, *one_strategy, without=absent)
    assert (status, "greedy" in out, "J/token" in out) == (0, True, False)
    assert f"energy isn't measured: it needs {install_command('energy')}" in err
    assert all(record["energy"] is None for record in load_records(tmp_path / "out"))
    done = command_line(*one_strategy, "--force", "--country", "FRA", without=absent)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert install_command("energy") in done.err


def test_the_report_needs_its_extra(one_strategy: list[object], command_line: CommandLine, tmp_path: Path) -> None:
    done = command_line(*one_strategy, without=("jinja2",))
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert install_command("sweep") in done.err
    assert not (tmp_path / "out").exists()
