"""Energy: figures that add up, one whole row a run, and codecarbon kept quiet, offline and out of the measured time."""

import csv
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from codecarbon.core import cpu as codecarbon_cpu
from codecarbon.core import hardware_cache
from codecarbon.external import hardware as codecarbon_hardware
from codecarbon.input import DataSource
from codecarbon.output_methods.emissions_data import EmissionsData
from support.commands import CommandLine, start, wait_until
from support.isolated import COMMAND_LINE, EXPORT_ONLY, REFERENCES, run
from support.systems import posix
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.errors import OptionError
from gpt2onnx.runtime.options import BY_NAME

PROMPT = "Once upon a time"
JOULES_PER_KWH = 3.6e6

# Fails where anything opens a connection or looks a name up.
NO_NETWORK = """
import socket, urllib.request
def refuse(*arguments, **named):
    raise AssertionError(f"the network was used: {arguments}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
try:
    urllib.request.urlopen("http://127.0.0.1:9/")
except AssertionError:
    pass
else:
    raise SystemExit("the network isn't blocked")
"""


@pytest.fixture
def known_power(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose memory takes 20 W and whose processor takes 100 W at full load."""
    monkeypatch.setenv("CODECARBON_FORCE_RAM_POWER", "20")
    monkeypatch.setenv("CODECARBON_FORCE_CPU_POWER", "100")
    yield
    hardware_cache.clear_cache()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def near(value: float, relative: float, absolute: float = 0.0) -> Any:
    return pytest.approx(value, rel=relative, abs=absolute)


@pytest.mark.usefixtures("known_power")
def test_figures_add_up(tales_model: gpt2onnx.Model, tmp_path: Path) -> None:
    path = tmp_path / "emissions.csv"
    least = max(1, 10 * tales_model.generate(PROMPT, max_new_tokens=20, do_sample=False).seconds)
    with gpt2onnx.track_energy(path, country="FRA", seconds=least) as tracker:
        started = time.perf_counter()
        result = tales_model.generate(PROMPT, max_new_tokens=20, do_sample=False)
        wall = time.perf_counter() - started
    (row,) = read(path)
    figures = {name: number for name, value in row.items() if (number := as_number(value)) is not None}
    kwh = figures["energy_consumed"]
    # Known watts, by the test's own clock.
    assert figures["ram_power"] == near(20, 0.01)
    assert 20 * least * 0.99 <= figures["ram_energy"] * JOULES_PER_KWH <= 20 * wall * 1.01
    assert 10 * 0.99 <= figures["cpu_power"] <= 100 * 1.01
    assert kwh == near(figures["cpu_energy"] + figures["ram_energy"] + figures["gpu_energy"], 1e-9)
    powers = sum(figures[f"{part}_power"] for part in ("cpu", "gpu", "ram"))
    assert kwh * JOULES_PER_KWH == near(powers * figures["duration"], 1e-9)
    # Known emissions of a known country.
    intensity = DataSource().get_global_energy_mix_data()["FRA"]["carbon_intensity"]
    assert figures["emissions"] * 1000 == near(kwh * intensity, 1e-9)
    assert figures["g_co2eq_per_kwh"] == near(intensity, 1e-9)

    assert row["completion_tokens"] == str(len(result.sequences[0].token_ids)) == "20"
    assert row["prompt_tokens"] == str(len(result.prompt_ids))
    runs = int(row["runs"])
    assert runs > 1
    assert figures["seconds"] * runs == near(figures["duration"], 0.02, 0.1)
    assert 0 < figures["cpu_seconds"] <= figures["seconds"] * 1.5  # one thread, and codecarbon's
    assert figures["tokens_per_second"] == near(20 / figures["seconds"], 1e-9)
    assert figures["joules"] * runs == near(kwh * JOULES_PER_KWH, 1e-9)
    assert figures["joules_per_token"] * 20 == near(figures["joules"], 1e-9)
    assert figures["g_co2eq_per_1000_tokens"] * 20 / 1000 * runs == near(figures["emissions"] * 1000, 1e-9)

    energy = result.energy
    assert energy is not None
    assert energy.run_id == row["run_id"] == tracker.rows[0]["run_id"]
    assert (energy.joules_per_token, energy.runs) == (float(row["joules_per_token"]), runs)
    assert result.to_dict()["energy"] == dataclasses.asdict(energy)


def test_a_row_tells_everything_about_its_run(tales_model: gpt2onnx.Model, tmp_path: Path) -> None:
    path = tmp_path / "emissions.csv"
    with gpt2onnx.track_energy(path, seconds=0):
        tales_model.generate(
            PROMPT, max_new_tokens=3, num_beams=2, do_sample=False, suppress_tokens=[1, 2], stop=["\n", ","]
        )
        tales_model.generate([PROMPT, "One day"], max_new_tokens=3, top_p=0.5, min_p=0.1, seed=7)
    beams, sampled = read(path)
    assert set(beams) >= {field.name for field in dataclasses.fields(EmissionsData)}
    assert set(beams) >= set(BY_NAME)
    assert (beams["strategy"], beams["num_beams"], beams["requests"]) == ("beam search", "2", "1")
    assert (json.loads(beams["suppress_tokens"]), json.loads(beams["stop"])) == ([1, 2], ["\n", ","])
    assert (sampled["strategy"], sampled["top_p"], sampled["min_p"], sampled["seed"]) == ("sampling", "0.5", "0.1", "7")
    assert (sampled["requests"], sampled["completion_tokens"], sampled["temperature"]) == ("2", "6", "1.0")
    assert beams["run_id"] != sampled["run_id"]
    assert (beams["model"], beams["dtype"], beams["device"], beams["threads"]) == ("tales", "fp32", "cpu", "1")
    assert beams["onnxruntime_version"][0].isdigit()
    assert "estimate" in beams["method"]
    assert (beams["country_iso_code"], beams["runs"], beams["reliable"]) == ("", "1", "False")


def test_short_runs_are_repeated_until_they_can_be_relied_on(tales_model: gpt2onnx.Model) -> None:
    enough = 30 * tales_model.generate(PROMPT, max_new_tokens=10, do_sample=False).seconds
    with gpt2onnx.track_energy() as tracker:
        assert tracker.meter.method.seconds >= 1
        tracker.meter.method = dataclasses.replace(tracker.meter.method, seconds=enough)
        for seconds in (enough, enough / 3, 0.0):
            tracker.seconds = seconds
            tales_model.generate(PROMPT, max_new_tokens=10, do_sample=False)
    long, short, once = tracker.rows
    assert long["duration"] >= enough
    assert long["runs"] > 1
    assert (short["runs"] > 1, once["runs"]) == (True, 1)
    assert (long["reliable"], short["reliable"], once["reliable"]) == (True, False, False)
    # All of them are of one run, however often it was made.
    assert long["completion_tokens"] == short["completion_tokens"] == once["completion_tokens"] == 10


def test_every_repetition_pays_for_its_prompt(tales_model: gpt2onnx.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    forward = tales_model.runner.forward

    def counting(cache: Any, rows: slice, tokens: Any, *others: Any, **named: Any) -> Any:
        passed.append(tokens.shape[1])
        return forward(cache, rows, tokens, *others, **named)

    prompt = list(range(100, 140))
    once = tales_model.generate(prompt, max_new_tokens=4, do_sample=False).seconds
    monkeypatch.setattr(tales_model.runner, "forward", counting)
    with gpt2onnx.track_energy(seconds=10 * once) as tracker:
        tales_model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert tracker.rows[0]["runs"] > 1
    assert passed == [len(prompt), 1, 1, 1] * tracker.rows[0]["runs"]


def test_measuring_changes_no_token(tales_model: gpt2onnx.Model) -> None:
    options: list[dict[str, Any]] = [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"top_p": 0.9, "seed": 3},
    ]
    for given in options:
        plain = tales_model.generate(PROMPT, max_new_tokens=12, **given)
        with gpt2onnx.track_energy(seconds=0.1):
            measured = tales_model.generate(PROMPT, max_new_tokens=12, **given)
            if "num_beams" not in given:
                stream = tales_model.stream(PROMPT, max_new_tokens=12, **given)
                assert "".join(stream) == plain.text
                assert stream.result.energy is not None
        assert_same_tokens(measured.sequences[0].token_ids, plain.sequences[0].token_ids, given)
        assert plain.energy is None


def test_unseeded_sampling_is_repeatable(tales_model: gpt2onnx.Model) -> None:
    with gpt2onnx.track_energy(seconds=0.1) as tracker:
        result = tales_model.generate(PROMPT, max_new_tokens=12, do_sample=True)
        tales_model.generate(PROMPT, max_new_tokens=12, do_sample=True)
    seeds = [row["seed"] for row in tracker.rows]
    assert seeds[0] != seeds[1]
    again = tales_model.generate(PROMPT, max_new_tokens=12, do_sample=True, seed=seeds[0])
    assert_same_tokens(again.sequences[0].token_ids, result.sequences[0].token_ids)


def test_a_stream_left_early_has_its_row(tales_model: gpt2onnx.Model) -> None:
    with gpt2onnx.track_energy(seconds=1) as tracker:
        stream = tales_model.stream(PROMPT, max_new_tokens=30, do_sample=False)
        next(stream)
        next(stream)
        assert tracker.rows == []
    (row,) = tracker.rows
    assert (row["runs"], row["reliable"]) == (1, False)
    assert row["completion_tokens"] == stream.result.usage["completion_tokens"] < 30


def test_runs_at_the_same_time_are_not_relied_on(tales_model: gpt2onnx.Model) -> None:
    with gpt2onnx.track_energy(seconds=0) as tracker:
        tracker.meter.method = dataclasses.replace(tracker.meter.method, seconds=0.0)
        stream = tales_model.stream(PROMPT, max_new_tokens=4, do_sample=False)
        next(stream)
        tales_model.generate(PROMPT, max_new_tokens=2)
        stream.close()
        tales_model.generate(PROMPT, max_new_tokens=2)
    assert [row["reliable"] for row in tracker.rows] == [False, False, True]


def test_an_error_leaves_no_row_and_no_thread(tales_model: gpt2onnx.Model, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    with gpt2onnx.track_energy(tmp_path / "e.csv", seconds=0) as tracker:
        with pytest.raises(gpt2onnx.errors.PromptError):
            tales_model.generate([99_999], max_new_tokens=2)
        tales_model.generate(PROMPT, max_new_tokens=2)
    assert len(tracker.rows) == len(read(tmp_path / "e.csv")) == 1
    # codecarbon's own are told to end, and take their time.
    wait_until(lambda: set(threading.enumerate()) <= threads)
    # Outside of the block nothing is measured.
    tales_model.generate(PROMPT, max_new_tokens=2)
    assert len(tracker.rows) == 1


def test_counters_are_read_where_the_processor_has_them(
    tales_model: gpt2onnx.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    counter = zone / "energy_uj"
    counter.write_text("1000000\n")
    real = codecarbon_hardware.IntelRAPL
    monkeypatch.setattr(codecarbon_cpu, "is_rapl_available", lambda *_: True)
    monkeypatch.setattr(
        codecarbon_hardware, "IntelRAPL", lambda rapl_dir, **named: real(rapl_dir=str(zone.parent), **named)
    )
    hardware_cache.clear_cache()
    try:
        with gpt2onnx.track_energy(seconds=0) as tracker:
            stream = tales_model.stream(PROMPT, max_new_tokens=5, do_sample=False)
            next(stream)
            counter.write_text("6000000\n")
            list(stream)
    finally:
        hardware_cache.clear_cache()
    (row,) = tracker.rows
    assert row["method"].startswith("CPU: RAPL")
    assert row["cpu_energy"] * JOULES_PER_KWH == near(5.0, 1e-6)


def test_a_job_is_one_row(
    command_line: CommandLine, tales_bundle: Path, tales_model: gpt2onnx.Model, tmp_path: Path
) -> None:
    requests = [{"id": index, "prompt": "One day", "max_new_tokens": 3 + index} for index in range(5)] + [{"id": 9}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    job = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--batch-size", 2, "--threads", 1]
    done = command_line("generate", "-m", tales_bundle, *job, "--energy", tmp_path / "e.csv")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("5 done, 1 failed; ")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    (row,) = read(tmp_path / "e.csv")
    assert (row["strategy"], row["requests"], row["runs"]) == ("job", "6", "1")
    assert (
        int(row["completion_tokens"])
        == sum(record.get("usage", {}).get("completion_tokens", 0) for record in records)
        > 0
    )
    assert [record["energy"] for record in records[:5]] == [None] * 5


def test_the_command_prints_what_the_row_says(command_line: CommandLine, tales_bundle: Path, tmp_path: Path) -> None:
    command = ["generate", PROMPT, "-m", tales_bundle, "--threads", 1, "--max-new-tokens", 15, "--seed", 4]
    plain = command_line(*command, "--json")
    seconds = 10 * json.loads(plain.out)["seconds"]
    energy = ["--energy", tmp_path / "e.csv", "--energy-seconds", seconds, "--country", "usa"]
    done = command_line(*command, *energy, "--json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    (row,) = read(tmp_path / "e.csv")
    assert result["sequences"] == json.loads(plain.out)["sequences"]
    assert json.loads(plain.out)["energy"] is None
    assert (
        row["completion_tokens"]
        == str(result["usage"]["completion_tokens"])
        == str(len(result["sequences"][0]["token_ids"]))
    )
    assert result["energy"]["joules_per_token"] == float(row["joules_per_token"])
    assert result["energy"]["runs"] == int(row["runs"]) > 1
    assert (result["energy"]["country"], row["country_name"]) == ("USA", "United States")
    text = command_line(*command, *energy)
    assert (text.code, text.out, text.err) == (0, result["sequences"][0]["text"] + "\n", "")
    assert len(read(tmp_path / "e.csv")) == 2


@pytest.mark.system
def test_quiet_offline_and_without_surprise_files(
    tales_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, temporary, here = (tmp_path / name for name in ("home", "temporary", "here"))
    for folder in (home, temporary, here):
        folder.mkdir()
    # What a user may have configured for programs of their own.
    config = (
        "[codecarbon]\nemissions_endpoint=http://127.0.0.1:9\noutput_methods=csv,api\nelectricitymaps_api_token=t\n"
    )
    config += "output_dir=/nowhere\nallow_multiple_runs=False\nlog_level=debug\n"
    (home / ".codecarbon.config").write_text(config)
    monkeypatch.chdir(here)
    places = {"HOME": str(home), "TMPDIR": str(temporary), "CODECARBON_LOG_LEVEL": "info"}
    plain = ["generate", PROMPT, "-m", tales_bundle, "--max-new-tokens", 4]
    measured = [*plain, "--energy", "e.csv", "--energy-seconds", 0, "--country", "FRA"]
    without = (*REFERENCES, *EXPORT_ONLY)

    def files() -> set[str]:
        return {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}

    expected = run(NO_NETWORK + COMMAND_LINE, *plain, without=without, **places)
    before = files()  # ONNX Runtime writes some of its own, too
    assert (expected[0], expected[2]) == (0, "")
    lock = temporary / ".codecarbon.lock"  # of another program
    lock.touch()
    assert run(NO_NETWORK + COMMAND_LINE, *measured, without=without, **places) == expected
    lock.unlink()
    assert len(read(here / "e.csv")) == 1
    assert files() - before == {"here/e.csv"}


@pytest.mark.system
def test_start_up_is_outside_the_measured_time(tales_bundle: Path) -> None:
    code = (
        "import time, gpt2onnx\n"
        "model = gpt2onnx.load(sys.argv[1], threads=1)\n"
        "model.generate('Once', max_new_tokens=2)\n"
        "started = time.perf_counter()\n"
        "with gpt2onnx.track_energy(seconds=0) as tracker:\n"
        "    ready = time.perf_counter()\n"
        "    result = model.generate('Once', max_new_tokens=2)\n"
        "print(ready - started, tracker.rows[0]['duration'], tracker.rows[0]['seconds'], result.seconds)"
    )
    status, out, err = run(code, tales_bundle)
    assert (status, err) == (0, "")
    start_up, duration, seconds, generating = map(float, out.split())
    assert start_up > 0.3, "codecarbon started so fast that this test shows nothing"
    assert generating <= seconds <= duration < start_up / 4


def test_what_cannot_work_is_said_before_anything_is_generated(
    command_line: CommandLine, tales_bundle: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("timestamp,emissions\n2020,1\n")
    cases: list[tuple[list[object], int, str]] = [
        (["--energy", tmp_path / "no" / "e.csv"], 1, "can't write"),
        (["--energy", tmp_path], 1, "can't write"),
        (["--energy", other], 1, "has other columns"),
        (["--energy", tmp_path / "e.csv", "--country", "XXX"], 1, "no country 'XXX'"),
        (["--country", "FRA"], 2, "go with --energy"),
        (["--energy-seconds", "1"], 2, "go with --energy"),
        (["--energy", tmp_path / "e.csv", "--energy-seconds", 1, "--input", other], 2, "not with --input"),
        (["--energy", tmp_path / "e.csv", "--energy-seconds", "4000"], 2, "0<=x<=3600"),
    ]
    for arguments, code, message in cases:
        prompt = [] if "--input" in arguments else [PROMPT]
        done = command_line("generate", *prompt, "-m", tales_bundle, *arguments)
        assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), arguments
        assert message in done.err
    assert other.read_text() == "timestamp,emissions\n2020,1\n"
    with pytest.raises(OptionError, match="from 0 to 3600"), gpt2onnx.track_energy(seconds=-1):
        pass


@posix
@pytest.mark.system
def test_an_interrupted_job_keeps_its_row(tales_bundle: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"id": index, "prompt": "One day", "max_new_tokens": 60}) for index in range(2000)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.jsonl"
    options = ["--input", tmp_path / "in.jsonl", "--output", out, "--energy", tmp_path / "e.csv"]
    process = start("generate", "-m", tales_bundle, "--threads", 1, *options)
    wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") > 3, seconds=60)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "gpt2onnx: interrupted")
    (row,) = read(tmp_path / "e.csv")
    written = out.read_text().splitlines()
    assert len(written) <= int(row["requests"]) < len(lines)
    assert int(row["completion_tokens"]) >= 60 * (len(written) - 1)
    assert row["reliable"] == "False"
