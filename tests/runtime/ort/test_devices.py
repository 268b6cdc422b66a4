"""Devices: which one a name means, what is said where it isn't there, and the path that keeps the cache on a device.

No test here needs a GPU but those marked `gpu`. The path through a device's memory runs on the CPU provider too, which
is then treated as a device: its cache lies in OrtValues, and rows are moved by a graph.
"""

import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from support.commands import CommandLine
from support.reference import Reference
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.errors import BackendError, OptionError, install_command
from gpt2onnx.models.bundle import Bundle
from gpt2onnx.runtime.arrays import CacheCopy
from gpt2onnx.runtime.engine.kv_cache import KVCache
from gpt2onnx.runtime.engine.runner import Runner
from gpt2onnx.runtime.ort import devices, helper_graphs, providers
from gpt2onnx.runtime.ort.binding import device_storage
from gpt2onnx.runtime.requests import Request

BUILT_IN = ["AzureExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends the CPU provider down the path of devices that have a memory of their own."""
    monkeypatch.setitem(devices.MEMORY, devices.CPU, "cpu")


STRATEGIES: list[dict[str, Any]] = [
    {},
    {"num_beams": 5, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "do_sample": True, "seed": 5, "num_return_sequences": 2},
    {"do_sample": True, "seed": 3, "num_return_sequences": 3},
]
TEXTS = ["Once upon a time", "The old king had", "Once upon a time there was a"]


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("options", STRATEGIES, ids=str)
def test_tokens_on_a_device_are_those_of_transformers(
    tales_bundle: Path, tales_reference: Reference, options: dict[str, Any]
) -> None:
    model = gpt2onnx.load(tales_bundle, threads=1)
    # One after another: the second has to make the cache longer, the third finds a prefix that it shares.
    for text, length in zip(TEXTS, (8, 66, 16), strict=True):
        result = model.generate(text, max_new_tokens=length, **options)
        greedy = {"do_sample": False} | {name: value for name, value in options.items() if name != "seed"}
        expected = tales_reference.tokens(result.prompt_ids, options.get("seed"), max_new_tokens=length, **greedy)
        for index, (sequence, tokens) in enumerate(zip(result.sequences, expected, strict=True)):
            assert_same_tokens(sequence.token_ids, tokens, f"{text!r}, sequence {index}")
    assert not hasattr(model._scheduler._rows.cache.storage, "data"), "the cache lies on the host"


def test_batches_and_drafts_on_a_device(
    tales_bundle: Path, tales_model: gpt2onnx.Model, request: pytest.FixtureRequest
) -> None:
    requests = [
        Request(
            TEXTS[index % 3],
            tales_model.generation_config.merged(
                {"max_new_tokens": 5 + 6 * (index % 4)} | [*STRATEGIES, {"prompt_lookup": 4}][index % 5]
            ),
            index,
        )
        for index in range(15)
    ]
    expected = {one.id: outcome for one, outcome in tales_model.complete(requests, 4)}
    request.getfixturevalue("device_path")
    model = gpt2onnx.load(tales_bundle, threads=1)
    for one, outcome in model.complete(requests, 4):
        assert isinstance(outcome, gpt2onnx.Result)
        for sequence, same in zip(outcome.sequences, expected[one.id].sequences, strict=True):
            assert_same_tokens(sequence.token_ids, same.token_ids, one)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_device_storage_moves_rows_as_the_host_does(dtype: type) -> None:
    """Rows trade places and the cache grows, on both kinds of storage."""
    shape = (2, 2, 3, 2, 5, 8)
    content = np.random.default_rng(0).normal(size=shape).astype(dtype)
    host, device = KVCache(shape, dtype), KVCache(shape, dtype, device_storage(devices.CPU, "cpu", dtype))
    for cache in (host, device):
        _view(cache)[:] = content
        for row in range(3):
            cache.advance(slice(row, row + 1), 3 + row)
        cache.copy([CacheCopy(0, 2, 0, 3), CacheCopy(2, 0, 0, 5)])
        cache.copy([])
    for larger in ((2, 2, 3, 2, 9, 8), (2, 2, 7, 2, 9, 8)):
        grown = KVCache(larger, dtype), KVCache(larger, dtype, device_storage(devices.CPU, "cpu", dtype))
        for old, new in zip((host, device), grown, strict=True):
            new.take_over(old)
        host, device = grown
    assert host.lengths.tolist() == device.lengths.tolist() == [5, 4, 3, 0, 0, 0, 0]
    for row, source in enumerate([2, 1, 0]):
        length = host.lengths[row]
        assert (_view(host)[:, :, row, :, :length] == content[:, :, source, :, :length]).all(), f"row {row}"
        assert (host.data[:, :, row, :, :length] == _view(device)[:, :, row, :, :length]).all(), f"row {row}"
    assert host.nbytes == device.nbytes == host.data.nbytes
    assert np.isfinite(_view(device)).all(), "memory that attention reads with weight 0 must be finite"


def _view(cache: KVCache) -> np.ndarray:
    """A cache's memory as an array, wherever it lies."""
    import ctypes

    memory = (ctypes.c_char * cache.nbytes).from_address(cache.address(0, 0, 0))
    return np.frombuffer(memory, cache._dtype).reshape(cache.shape)


def test_addresses_are_those_of_numpy() -> None:
    cache = KVCache((3, 2, 4, 2, 5, 8), np.float16)
    for layer in range(3):
        for part in range(2):
            for row in range(4):
                assert cache.address(layer, part, row) == cache.data[layer, part, row].ctypes.data


def test_helper_graphs_are_valid_onnx() -> None:
    for graph in (helper_graphs.identity(), *map(helper_graphs.rearrangement, (np.float32, np.float16))):
        onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("cpu", "CPUExecutionProvider"),
        ("CUDA", "CUDAExecutionProvider"),
        ("CUDAExecutionProvider", "CUDAExecutionProvider"),
        ("openvino", "OpenVINOExecutionProvider"),
        ("dml", "DmlExecutionProvider"),
    ],
)
def test_names_of_devices(name: str, provider: str) -> None:
    assert devices.find(name, onnxruntime.get_all_providers()) == provider


@pytest.mark.parametrize("name", ["gpu", "", "cuda:0", "CPU ", "ExecutionProvider"])
def test_unknown_device_is_named(name: str, tales_bundle: Path) -> None:
    with pytest.raises(OptionError, match=r"is not known: give auto, or one of .*cpu, cuda") as caught:
        gpt2onnx.load(tales_bundle, device=name)
    assert repr(name) in str(caught.value)


def test_a_device_that_is_not_built_in(tales_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: BUILT_IN)
    with pytest.raises(BackendError) as caught:
        gpt2onnx.load(tales_bundle, device="cuda")
    message = str(caught.value)
    assert "\n" not in message
    assert f"onnxruntime {onnxruntime.__version__}, which offers azure, cpu: " in message
    assert f"pip uninstall onnxruntime, then {install_command('gpu')}" in message


class FallenBack:
    """An onnxruntime that was built with CUDA and can't load it: sessions are on the CPU, a log line says why."""

    LOG = (
        "\x1b[1;31m2026-11-22 02:19:40.605 [E:onnxruntime:Default, provider_bridge_ort.cc:2458 operator()] "
        "/src/provider_bridge_ort.cc:2043 Provider& ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : "
        "Failed to load library /usr/lib/onnxruntime/capi/libonnxruntime_providers_cuda.so with error: "
        "libcublasLt.so.13: cannot open shared object file: No such file or directory\n\x1b[m\n"
        "\x1b[0;93m[W:onnxruntime:Default, onnxruntime_pybind_state.cc:1295] Failed to create CUDAExecutionProvider. "
        "Require cuDNN 9.* and CUDA 13.*. Please install all dependencies\x1b[m\n"
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Sequence[str]] = []
        real = onnxruntime.InferenceSession

        def create(graph: object, options: object = None, *, providers: Sequence[str], enable_fallback: bool) -> object:
            assert not enable_fallback
            self.asked.append(providers)
            if providers != [devices.CPU] and isinstance(graph, bytes):
                os.write(2, self.LOG.encode())
            return real(graph, options, providers=[devices.CPU])

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [devices.CUDA, devices.CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", create)


def test_a_silent_fallback_is_an_error_that_quotes_onnxruntime(
    tales_fp16_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake = FallenBack(monkeypatch)
    with pytest.raises(BackendError) as caught:
        gpt2onnx.load(tales_fp16_bundle, device="cuda")
    message = str(caught.value)
    assert fake.asked == [[devices.CUDA], [devices.CUDA]]
    assert message.startswith(
        "CUDAExecutionProvider doesn't load: Failed to load library libonnxruntime_providers_cuda.so with error:"
        " libcublasLt.so.13: cannot open shared object file: No such file or directory"
    )
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in message
    assert "\n" not in message
    assert capfd.readouterr().err == ""


def test_auto_takes_what_works(tales_fp16_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FallenBack(monkeypatch)
    model = gpt2onnx.load(tales_fp16_bundle, device="auto", threads=1)
    assert model.runner.device == "cpu"
    assert fake.asked[0] == [devices.CUDA], "the better device was not tried"
    assert fake.asked[-1] == [devices.CPU]
    assert len(model.generate("Once", max_new_tokens=3).sequences[0].token_ids) == 3


@pytest.fixture(scope="module")
def tales_fp16_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp16 bundle, which CUDA would run."""
    return gpt2onnx.export(
        "tales", tmp_path_factory.mktemp("fp16") / "bundle", dtype="fp16", parity=False, quality=False
    ).folder


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_what_cuda_has_no_kernels_for_is_refused(
    dtype: str, tales_bundle: Path, tales_int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where CUDA works; where it doesn't, that comes first, since another export wouldn't help."""
    folder = tales_bundle if dtype == "fp32" else tales_int8_bundle
    FallenBack(monkeypatch)
    with pytest.raises(BackendError, match="CUDAExecutionProvider doesn't load"):
        gpt2onnx.load(folder, device="cuda")
    monkeypatch.setattr(providers, "why_not", lambda provider: None)
    with pytest.raises(BackendError, match=f"in fp16 only, this one is {dtype}: export with --dtype fp16"):
        gpt2onnx.load(folder, device="cuda")
    assert gpt2onnx.load(folder, device="auto", threads=1).runner.device == "cpu"


def test_auto_says_why_it_is_not_cuda(tales_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="gpt2onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "get_available_providers", lambda: [devices.CPU])
        assert gpt2onnx.load(tales_bundle, device="auto", threads=1).runner.device == "cpu"
    assert "cuda is not a device of the installed" in caplog.text


def test_other_providers_run_portable_bundles_only(tales_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = ["OpenVINOExecutionProvider", devices.CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    monkeypatch.setattr(providers, "why_not", lambda provider: None)
    with pytest.raises(BackendError, match="for openvino, export with --graph portable"):
        gpt2onnx.load(tales_bundle, device="openvino")


@pytest.mark.skipif(
    "AzureExecutionProvider" not in onnxruntime.get_available_providers()
    or not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason="onnxruntime without the Azure provider, or before 1.24, which doesn't tell who runs what",
)
def test_a_provider_that_takes_no_operator_is_no_device() -> None:
    """onnxruntime's own Azure provider loads anywhere and leaves everything to the CPU."""
    graph = helper_graphs.rearrangement(np.float32)
    with pytest.raises(BackendError, match="AzureExecutionProvider takes none of the operators of a graph"):
        providers.open_graph(graph, "AzureExecutionProvider", threads=1, name="a graph")


class PartlyAssigned:
    """A session whose provider left some operators to the CPU."""

    def __init__(self, on_cuda: Sequence[str], on_cpu: Sequence[str]) -> None:
        self._parts = {devices.CUDA: on_cuda, devices.CPU: on_cpu}

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        nodes = {name: [SimpleNamespace(op_type=kind) for kind in kinds] for name, kinds in self._parts.items()}
        return [SimpleNamespace(ep_name=name, get_nodes=lambda each=each: each) for name, each in nodes.items()]


def test_a_provider_that_leaves_the_attention_to_the_cpu_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BackendError, match="leaves the attention of the graph to the CPU"):
        providers._check_share(PartlyAssigned(["MatMul"], ["Shape", "GroupQueryAttention"]), devices.CUDA, "the graph")
    with caplog.at_level("INFO"):
        providers._check_share(PartlyAssigned(["MatMul", "Add"], ["Squeeze", "Shape"]), devices.CUDA, "the graph")
    assert "the graph: CUDAExecutionProvider runs 2 operators, the CPU Shape, Squeeze" in caplog.text


def test_onnxruntime_tells_which_operators_a_provider_took(tales_bundle: Path) -> None:
    """The names that `_check_share` reads, on a real session; versions before 1.24 don't tell."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    real = onnxruntime.InferenceSession(tales_bundle / "onnx/model.onnx", options, providers=[devices.CPU])
    if hasattr(real, "get_provider_graph_assignment_info"):
        kinds = {node.op_type for part in real.get_provider_graph_assignment_info() for node in part.get_nodes()}
        assert {"GroupQueryAttention", "MatMul"} <= kinds
        with pytest.raises(BackendError, match="CUDAExecutionProvider takes none of the operators of x"):
            providers._check_share(real, devices.CUDA, "x")


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (FallenBack.LOG, "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: "),
        (
            "[W:onnxruntime] Failed to create DmlExecutionProvider. No adapter\n",
            "Failed to create DmlExecutionProvider",
        ),
        (
            "/src/python/state.cc:729 void onnxruntime::Register(Options&, int) Please install TensorRT",
            "Please install",
        ),
        ("CUDA error 100: no CUDA-capable device is detected", "CUDA error 100: no CUDA-capable device"),
        ("", "ONNX Runtime doesn't say why"),
    ],
)
def test_the_line_of_the_log_that_says_why(log: str, line: str) -> None:
    assert devices.said(log).startswith(line)
    assert "\x1b" not in devices.said(log)


def _installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *names: str) -> None:
    """Puts metadata of packages that hold an onnxruntime module on the path, in place of all others."""
    for name in names:
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        module = "onnxruntime_genai" if name == "onnxruntime-genai" else "onnxruntime"
        (folder / "RECORD").write_text(f"{module}/__init__.py,,\n{module}/capi/x.so,,\n")
        (tmp_path / module).mkdir(exist_ok=True)
        (tmp_path / module / "__init__.py").touch()  # Python 3.13 lists only files that are there
    found = list(metadata.distributions(path=[str(tmp_path)]))
    monkeypatch.setattr(metadata, "distributions", lambda: found)


def test_two_packages_at_once_are_explained(
    command_line: CommandLine, tales_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _installed(monkeypatch, tmp_path, "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime", "numpy")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: BUILT_IN)
    result = command_line("devices", "--json")
    facts = json.loads(result.out)["onnxruntime"]
    assert facts["installed"] == ["onnxruntime", "onnxruntime-gpu"]
    assert "are installed over each other" in facts["warning"]
    assert "pip uninstall onnxruntime onnxruntime-gpu" in facts["warning"]
    assert "warning: onnxruntime and onnxruntime-gpu" in command_line("devices").out
    error = command_line("generate", "x", "-m", tales_bundle, "--device", "cuda").err
    assert "which offers azure, cpu: onnxruntime and onnxruntime-gpu are installed over each other" in error
    loading = str(devices.not_loaded(devices.CUDA, "no reason"))
    assert "doesn't load: no reason; besides, onnxruntime and onnxruntime-gpu are installed over" in loading


def test_one_package_is_no_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, tmp_path, "onnxruntime-gpu", "onnxruntime-genai")
    assert devices.packages() == ["onnxruntime-gpu"]
    assert devices.conflict() is None


def test_devices_command(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    result = command_line("devices", "--json")
    facts = json.loads(result.out)
    assert (result.code, result.err) == (0, "")
    assert facts["onnxruntime"]["version"] == onnxruntime.__version__
    assert [each["provider"] for each in facts["devices"]] == onnxruntime.get_available_providers()
    assert {each["device"]: each["loads"] for each in facts["devices"]}["cpu"] is True
    affinity = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))(0)
    assert facts["cores"]["affinity"] == len(affinity)
    plain = command_line("devices")
    assert plain.code == 0
    assert f"ONNX Runtime {onnxruntime.__version__}" in plain.out
    FallenBack(monkeypatch)
    broken = command_line("devices", "--json")
    cuda, cpu = json.loads(broken.out)["devices"]
    assert (cuda["device"], cuda["loads"], cpu["loads"]) == ("cuda", False, True)
    assert "libcublasLt.so.13" in cuda["reason"]
    assert json.loads(broken.out)["auto"] == "cpu"
    assert broken.err == ""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [each for each in STRATEGIES if not (each.get("do_sample") and "num_beams" in each)], ids=str
)
def test_cuda_gives_the_tokens_of_the_cpu(tales_fp16_bundle: Path, options: dict[str, Any]) -> None:
    """On hardware: the same fp16 bundle on both devices, in batches.

    CUDA adds up in float16 where the CPU adds up in float32, so that a draw at the border of two tokens may fall to the
    other. What must hold in any case: each token is as probable as one pass over the whole text on the CPU says.
    """
    on_cpu = gpt2onnx.load(tales_fp16_bundle, threads=1)
    on_cuda = gpt2onnx.load(tales_fp16_bundle, device="cuda")
    assert on_cuda.runner.device == "cuda"
    single = options.get("num_beams", 1) == 1
    asked = options | ({"logprobs": 0} if single else {})
    for text, expected, result in zip(
        TEXTS,
        on_cpu.generate(TEXTS, max_new_tokens=24, batch_size=3, **asked),
        on_cuda.generate(TEXTS, max_new_tokens=24, batch_size=3, **asked),
        strict=True,
    ):
        for one, other in zip(result.sequences, expected.sequences, strict=True):
            if not options.get("do_sample"):
                assert_same_tokens(one.token_ids, other.token_ids, options)
            if single:
                said = [token.logprob for token in one.logprobs or []]
                difference = np.abs(np.subtract(said, on_cpu.score(one.token_ids, prompt=text).logprobs)).max()
                assert difference < 0.1, f"{text!r}: log probabilities differ by {difference}"


@pytest.mark.gpu
def test_logits_on_cuda_are_those_of_the_cpu(tales_fp16_bundle: Path) -> None:
    bundle = Bundle.open(tales_fp16_bundle)
    tokens = np.arange(1, 33)[None]
    logits = []
    for device in ("cpu", "cuda"):
        loaded = Runner(bundle, device=device)
        cache = loaded.new_cache(1, 40)
        loaded.forward(cache, slice(0, 1), tokens[:, :20])
        logits.append(loaded.forward(cache, slice(0, 1), tokens[:, 20:], logits="all").copy())
    difference = float(np.abs(logits[0] - logits[1]).max())
    assert difference < 0.1, f"largest difference {difference}"
