"""The offline kit, installed on a bare machine, and jobs as a service runs them."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name, parse_wheel_filename
from support.commands import wait_until
from support.paths import REPOSITORY
from support.systems import posix

import gpt2onnx

DEPLOY = REPOSITORY / "deploy"
UNIT = DEPLOY / "gpt2onnx-job@.service"
LARGEST_KIT = 120e6
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
HERE = f"linux-{platform.machine()}"
TARGETS = {"linux-x86_64": "manylinux.*_x86_64", "linux-aarch64": "manylinux.*_aarch64", "windows-x86_64": "win_amd64"}

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="kits for Linux are built and installed here"),
]


def run(*command: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=600, **settings)


@pytest.fixture(scope="module")
def kits(tales_int8_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Kits by target; the one for this machine builds the wheel that the others take."""
    folder = tmp_path_factory.mktemp("kits")

    def build(name: str, *own: str) -> Path:
        options = ["--platform", name, "--python", PYTHON, *own]
        done = run(sys.executable, DEPLOY / "build_kit.py", tales_int8_bundle, folder / name, *options)
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        sizes = {path.relative_to(folder / name).as_posix(): path.stat().st_size for path in files_in(folder / name)}
        assert (facts["files"], facts["bytes"]) == (sizes, sum(sizes.values()))
        return folder / name

    here = build(HERE)
    (wheel,) = (here / "wheels").glob("gpt2onnx-*.whl")
    others = TARGETS.keys() - {HERE}
    with ThreadPoolExecutor() as pool:  # which wait for the package index
        yield {HERE: here} | dict(
            zip(others, pool.map(lambda name: build(name, f"--wheel={wheel}"), others), strict=True)
        )
    shutil.rmtree(folder)  # hundreds of megabytes that pytest would keep


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class Installed:
    """An installation without network, settings or files in its home."""

    def __init__(self, folder: Path, kit: Path) -> None:
        self.folder, self.home = folder / "installed", folder / "home"
        self.home.mkdir()
        self.done = self.run(base_python(), kit / "install.py", self.folder)

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(self.home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        # An index that was asked for all the same would not answer.
        environment |= dict.fromkeys(("PIP_INDEX_URL", "https_proxy", "http_proxy"), "http://127.0.0.1:9/")
        return run(*without_network(), *command, env=environment, cwd=self.home)

    def gpt2onnx(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return self.run(self.folder / "venv" / "bin" / "gpt2onnx", *arguments)


def base_python() -> str:
    """An interpreter that knows nothing of this environment."""
    return str(Path(sys.base_prefix) / "bin" / f"python{PYTHON}")


def without_network() -> list[str]:
    """Prefix that runs a command without any network, if the system allows it."""
    apart = ["unshare", "--map-root-user", "--net"]
    return apart if shutil.which("unshare") and run(*apart, "true").returncode == 0 else []


@pytest.fixture(scope="module")
def installed(kits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    folder = tmp_path_factory.mktemp("machine")
    yield Installed(folder, kits[HERE])
    shutil.rmtree(folder)  # hundreds of megabytes that pytest would keep


# The kit


@pytest.mark.parametrize("name", TARGETS)
def test_kit_is_small_and_whole(name: str, kits: dict[str, Path]) -> None:
    kit = kits[name]
    size = sum(path.stat().st_size for path in files_in(kit))
    assert size < LARGEST_KIT, f"{size / 1e6:.1f} MB"
    listed = {line.split("  ", 1)[1] for line in (kit / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.relative_to(kit).as_posix() for path in files_in(kit)} - {"SHA256SUMS"}
    assert run("sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS", cwd=kit).returncode == 0


@pytest.mark.parametrize("name", TARGETS)
def test_wheels_are_those_that_the_target_needs(name: str, kits: dict[str, Path]) -> None:
    wheels = {canonicalize_name(path.name.split("-")[0]): path.name for path in (kits[name] / "wheels").iterdir()}
    required = re.findall(r"^([\w.-]+)(?:\[cpu\])?==", (kits[name] / "requirements.txt").read_text(), re.MULTILINE)
    assert wheels.keys() == {*required, "pip"}
    assert {"gpt2onnx", "onnxruntime", "tokenizers"} <= wheels.keys()
    assert ("colorama" in wheels) == name.startswith("windows"), "click requires it on Windows only"
    for file in wheels.values():
        for tag in parse_wheel_filename(file)[3]:
            assert re.fullmatch("any|" + TARGETS[name], tag.platform), file
            assert tag.interpreter in ("py2", "py3", "cp" + PYTHON.replace(".", "")) or tag.abi == "abi3"


def test_kit_replaces_nothing_and_leaves_nothing(kits: dict[str, Path], tmp_path: Path) -> None:
    wheel = tmp_path / "gpt2onnx-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"no wheel")
    for kit, message in ((kits[HERE], "exists"), (tmp_path / "kit", "failed")):
        command = [DEPLOY / "build_kit.py", tmp_path / "no bundle", kit, "--platform", HERE, "--wheel", wheel]
        done = run(sys.executable, *command)
        assert done.returncode == 1
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [wheel]


# Installing


def test_installs_without_a_network(installed: Installed, kits: dict[str, Path], tales_int8_bundle: Path) -> None:
    assert installed.done.returncode == 0, installed.done.stderr
    report = json.loads(installed.done.stdout)
    assert report["installed"] == str(installed.folder)
    assert report["same_tokens_as_builder"] is True
    assert installed.run(report["command"], "--version").returncode == 0
    prompt = "The old king"
    done = installed.gpt2onnx("generate", "-m", report["bundle"], prompt, "--json", "--max-new-tokens", 20, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    expected = gpt2onnx.load(tales_int8_bundle).generate(prompt, max_new_tokens=20).sequences[0].token_ids
    assert json.loads(done.stdout)["sequences"][0]["token_ids"] == expected


def test_leaves_nothing_in_the_home(installed: Installed) -> None:
    """Neither caches nor the id that ONNX Runtime would report the machine by."""
    assert installed.done.returncode == 0
    assert installed.gpt2onnx("generate", "-m", installed.folder / "bundle", "Once", "--quiet").returncode == 0
    assert sorted(path.as_posix() for path in installed.home.rglob("*")) == []


def test_installed_is_only_what_generating_needs(installed: Installed) -> None:
    (site,) = installed.folder.glob("venv/lib/python*/site-packages")
    names = {canonicalize_name(path.name.split("-")[0]) for path in site.glob("*.dist-info")}
    assert {"gpt2onnx", "numpy", "onnxruntime", "tokenizers"} <= names
    assert names & {"onnx", "safetensors", "torch", "transformers", "pip", "pandas"} == set()


def damage(path: Path) -> None:
    """Changes a byte of a file, and not of those that are linked to it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def damage_wheel(kit: Path) -> None:
    damage(max((kit / "wheels").iterdir()))


def lose_wheel(kit: Path) -> None:
    max((kit / "wheels").iterdir()).unlink()


def exchange_wheel(kit: Path) -> None:
    """As if it had been changed before the sums were taken: pip compares the hashes of requirements.txt."""
    (wheel,) = (kit / "wheels").glob("click-*")
    damage(wheel)
    sums = kit / "SHA256SUMS"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    changed = re.sub(rf"^\w+(?=  wheels/{wheel.name}$)", digest, sums.read_text(), flags=re.MULTILINE)
    sums.unlink()
    sums.write_text(changed)


def for_another(**facts: str) -> Callable[[Path], None]:
    def change(kit: Path) -> None:
        content = json.loads((kit / "kit.json").read_text()) | facts
        (kit / "kit.json").unlink()
        (kit / "kit.json").write_text(json.dumps(content))

    return change


BAD = {
    "damaged wheel": (damage_wheel, "is damaged: copy the kit again"),
    "lost wheel": (lose_wheel, "copy the kit again"),
    "another Python": (for_another(python="3.99"), "the kit is for Python 3.99"),
    "another processor": (for_another(platform="linux-riscv64", machine="riscv64"), "the kit is for linux-riscv64"),
    "another system": (for_another(platform="macos-arm64"), "the kit is for macos-arm64"),
    "another wheel": (exchange_wheel, "failed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_kit_is_refused(name: str, kits: dict[str, Path], tmp_path: Path) -> None:
    change, message = BAD[name]
    kit = tmp_path / "kit"
    shutil.copytree(kits[HERE], kit, copy_function=os.link)
    change(kit)
    refused = Installed(tmp_path, kit)
    assert refused.done.returncode == 1, refused.done.stderr
    last = refused.done.stderr.splitlines()[-1]
    assert last.startswith("install: ")
    assert message in refused.done.stderr
    assert "Traceback" not in refused.done.stderr
    assert not refused.folder.exists()


def test_install_replaces_nothing(installed: Installed, kits: dict[str, Path]) -> None:
    before = len(files_in(installed.folder))
    done = installed.run(base_python(), kits[HERE] / "install.py", installed.folder)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert len(files_in(installed.folder)) == before


# The service


def unit_settings() -> dict[str, str]:
    return dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if re.match(r"[A-Z]\w+=", line))


@pytest.fixture
def service(installed: Installed, tmp_path: Path) -> list[str]:
    """The command that the unit runs, on this installation and with `tmp_path` as the state's folder."""
    assert installed.done.returncode == 0, installed.done.stderr
    line = unit_settings()["ExecStart"].replace("/opt/gpt2onnx", str(installed.folder))
    return shlex.split(line.replace("${STATE_DIRECTORY}", str(tmp_path)).replace("%i", "job"))


def requests(count: int) -> list[dict[str, Any]]:
    kinds: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 3, "top_k": 50}, {"num_beams": 3}]
    return [{"id": n, "prompt": f"Day {n} was", "max_new_tokens": 12} | kinds[n % 3] for n in range(count)]


@posix
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_killed_job_goes_on_without_loss_or_repetition(
    name: str, service: list[str], tmp_path: Path, installed: Installed, tales_model: gpt2onnx.Model
) -> None:
    number = signal.Signals[name]
    # In fp32, where no token depends on the rest of the batch.
    service = [part.replace(str(installed.folder / "bundle"), str(tales_model.bundle.folder)) for part in service]
    lines = [json.dumps(one) for one in requests(60)]
    content = "\n".join([*lines[:20], "{broken", *lines[20:]]) + "\n"
    results, codes, whole = tmp_path / "job.results.jsonl", list[int](), list[bytes]()
    assert unit_settings()["Restart"] == "on-failure"
    for part in (0, 12, 40):  # lines written when it is stopped
        with endless(tmp_path / "job.jsonl", content):
            job = subprocess.Popen(service, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed)
            wait_until(lambda part=part: len(lines_of(results)) >= part, seconds=120)
            job.send_signal(number)
            codes.append(job.wait(timeout=60))
        kept = lines_of(results)
        assert kept[: len(whole)] == whole, "a result was changed or lost"
        whole = [line for line in kept if line.endswith(b"\n")]
    ended = {signal.SIGKILL: {-9}, signal.SIGTERM: {130, -15}, signal.SIGINT: {130, -2}}[number]
    assert set(codes) <= ended, codes
    (tmp_path / "job.jsonl").write_text(content)
    assert run(*service).returncode == 0
    assert lines_of(results)[: len(whole)] == whole, "a result was changed or lost"
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["id"] for record in records] == [*range(20), None, *range(20, 60)]
    assert [index for index, record in enumerate(records) if "error" in record] == [20]
    for record, one in zip([r for r in records if "error" not in r], requests(60), strict=True):
        if one["id"] % 9 < 3:
            options = {"do_sample": False} | {k: v for k, v in one.items() if k not in ("id", "prompt")}
            expected = tales_model.generate(one["prompt"], **options)
            assert record["sequences"][0]["token_ids"] == expected.sequences[0].token_ids, one
    # Started once more, as after a reboot: nothing is done twice.
    before = results.read_bytes()
    assert run(*service).returncode == 0
    assert results.read_bytes() == before


@contextlib.contextmanager
def endless(path: Path, content: str) -> Iterator[None]:
    """A pipe with some content and no end, so that no job is done with it before it is stopped."""
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)  # to open it for writing alone would wait for a reader
    try:
        os.write(pipe, content.encode())
        yield
    finally:
        os.close(pipe)
        path.unlink()


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def heed() -> None:
    """Undoes a background shell's ignoring of SIGINT, which processes inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_exit_codes(installed: Installed, service: list[str], tmp_path: Path) -> None:
    """Exit codes of docs/deploy.md."""
    table = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", (REPOSITORY / "docs" / "deploy.md").read_text(), re.MULTILINE))
    assert {"0", "1", "2", "130"} <= table.keys()
    bundle = installed.folder / "bundle"
    missing = run(*service)
    assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (1, "", 1)
    assert installed.gpt2onnx("generate", "-m", bundle, "--no-such-option", "x").returncode == 2
    assert int(unit_settings()["RestartPreventExitStatus"]) == 2
    (tmp_path / "job.jsonl").write_text("{broken\n")
    assert run(*service).returncode == 0, "a bad line is a result, not a failure"
    # A reader that leaves.
    command = [installed.folder / "venv/bin/gpt2onnx", "generate", "-m", bundle, "Once", "--max-new-tokens", "400"]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert writer.stdout is not None
    writer.stdout.read(1)
    writer.stdout.close()
    assert writer.wait(timeout=60) == 1


def test_runs_where_memory_may_not_be_made_executable(service: list[str], tmp_path: Path) -> None:
    """As the unit's MemoryDenyWriteExecute has it; Linux 6.3 has a switch for that which needs no systemd."""
    assert unit_settings()["MemoryDenyWriteExecute"] == "yes"
    (tmp_path / "job.jsonl").write_text(json.dumps({"id": 1, "prompt": "Once", "max_new_tokens": 4}) + "\n")
    refuse = "import ctypes, os, sys; done = ctypes.CDLL(None).prctl(65, 1, 0, 0, 0); done and sys.exit(77); os.execv(sys.argv[1], sys.argv[1:])"
    probe = "import mmap\ntry: mmap.mmap(-1, 4096, prot=7)\nexcept PermissionError: pass\nelse: raise SystemExit('not refused')"
    tried = run(sys.executable, "-c", refuse, sys.executable, "-c", probe)
    if tried.returncode == 77:
        pytest.skip("this kernel has no such switch")
    assert tried.returncode == 0, tried.stderr
    done = run(sys.executable, "-c", refuse, *service)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(installed: Installed, tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/gpt2onnx", str(installed.folder)))
    done = run("systemd-analyze", "verify", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    exposure = run("systemd-analyze", "security", "--offline=true", "--threshold=10", unit)  # in tenths: below 1.0
    assert exposure.returncode == 0, exposure.stdout


def test_container_runs_the_same_job(installed: Installed, tmp_path: Path) -> None:
    text = (DEPLOY / "Containerfile").read_text()
    command = json.loads(text.split("CMD ")[-1])
    unit = shlex.split(unit_settings()["ExecStart"])[1:]
    assert [part for part in command if part.startswith("-")] == [part for part in unit if part.startswith("-")]
    assert not re.search(r"^USER (root|0)\b", text, re.MULTILINE)
    (tmp_path / "requests.jsonl").write_text(json.dumps({"id": 1, "prompt": "Once", "max_new_tokens": 4}) + "\n")
    local = [part.replace("/opt/gpt2onnx", str(installed.folder)) for part in command]
    done = run(installed.folder / "venv/bin/gpt2onnx", *local, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "results.jsonl").read_text())["id"] == 1
