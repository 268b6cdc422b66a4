"""Devices by name: ONNX Runtime's execution providers, the packages that bring them, and what each can run.

Knows no ONNX Runtime: which providers there are is told, so that all of it can be tested on any machine.
"""

import re
from collections.abc import Sequence

from gpt2onnx.errors import BackendError, OptionError, install_command

from ...models.bundle import Manifest

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
AUTO = "auto"

# Providers that run the fused graph, and their own memory, where they don't use the host's.
MEMORY: dict[str, str | None] = {CPU: None, CUDA: "cuda"}

_SUFFIX = "ExecutionProvider"
# https://onnxruntime.ai/docs/install; none of these may be installed beside another.
_EXTRAS = {CPU: "cpu", CUDA: "gpu", "TensorrtExecutionProvider": "gpu"}
_PACKAGES = {
    "NvTensorRTRTXExecutionProvider": "onnxruntime-trt-rtx",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "DmlExecutionProvider": "onnxruntime-directml",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "CANNExecutionProvider": "onnxruntime-cann",
    "WebGpuExecutionProvider": "onnxruntime-webgpu",
}


def device_name(provider: str) -> str:
    """The short name of a provider: "cuda" for CUDAExecutionProvider."""
    return provider.removesuffix(_SUFFIX).lower()


def find(device: str, known: Sequence[str]) -> str:
    """The provider that a device's name means, short or in full, in any case.

    Raises:
        OptionError: none of those known.
    """
    for provider in known:
        if device.lower() in (provider.lower(), device_name(provider)):
            return provider
    names = ", ".join(sorted(device_name(provider) for provider in known))
    raise OptionError(f"device {device!r} is not known: give auto, or one of ONNX Runtime's providers ({names})")


def not_offered(provider: str, available: Sequence[str], runtime: str) -> BackendError:
    """The error where the installed ONNX Runtime was built without a provider.

    Args:
        runtime: the package that runs, and its version.
    """
    installed = packages()
    mend = conflict(installed)
    if mend is None and provider in (*_EXTRAS, *_PACKAGES):
        extra = _EXTRAS.get(provider)
        install = f"pip install {_PACKAGES[provider]}" if extra is None else install_command(extra)
        mend = f"pip uninstall {' '.join(installed) or 'onnxruntime'}, then {install}"
    return BackendError(
        f"{device_name(provider)} is not a device of the installed {runtime}, which offers"
        f" {', '.join(map(device_name, available))}: {mend or f'it has to be built with {provider}'}"
    )


def not_loaded(provider: str, reason: str) -> BackendError:
    """The error where a provider is built in and doesn't load, given what ONNX Runtime says."""
    advice = _advice(reason)
    if overlaid := conflict():
        advice += f"; besides, {overlaid}"
    return BackendError(f"{provider} doesn't load: {reason}{advice}")


def unsuited(provider: str, manifest: Manifest) -> str | None:
    """Why a provider can't run a bundle, and which export it runs; None where it can.

    CUDA's GroupQueryAttention takes float16 (and bfloat16) only, while the activations of our fp32, int8 and int4
    bundles are float32:
    https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cuda/bert/group_query_attention.cc
    """
    if manifest.graph == "portable":
        return None
    if provider not in MEMORY:
        return (
            f"a fused bundle runs on {' and '.join(map(device_name, MEMORY))}:"
            f" for {device_name(provider)}, export with --graph portable"
        )
    if provider == CUDA and manifest.dtype != "fp16":
        return (
            f"on cuda a fused bundle runs in fp16 only, this one is {manifest.dtype}:"
            " export with --dtype fp16, or use --device cpu"
        )
    return None


def packages() -> list[str]:
    """The installed packages that hold an onnxruntime module."""
    from importlib import metadata  # slow to import, and rarely needed

    found = []
    for distribution in metadata.distributions():
        name = str(distribution.metadata["Name"] or "").lower()
        if name.startswith("onnxruntime") and any(
            file.as_posix() == "onnxruntime/__init__.py" for file in distribution.files or ()
        ):
            found.append(name)
    return sorted(set(found))


def conflict(installed: Sequence[str] | None = None) -> str | None:
    """The fault if several such packages share one module, and how to mend it; None without a fault."""
    installed = packages() if installed is None else installed
    if len(installed) < 2:
        return None
    return (
        f"{' and '.join(installed)} are installed over each other, and what was unpacked last is what runs:"
        f" pip uninstall {' '.join(installed)}, then install one of them"
    )


def said(log: str) -> str:
    """The line of ONNX Runtime's log or error that says why a provider didn't load, without colours, time and place."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in log.splitlines()]
    lines = [line for line in lines if line]
    for pattern in (r"Failed to load library.*", r"Failed to create.*", r".*\berror\b.*"):
        for line in lines:
            if match := re.search(pattern, line, re.IGNORECASE):
                return re.sub(r"\S*/(\S+\.so)\b", r"\1", match[0])
    # An exception may begin with the function that threw it: file.cc:12 type name(arguments) message
    return re.sub(r"^\S+\.cc:\d+ [^(]*\([^)]*\) ", "", lines[0]) if lines else "ONNX Runtime doesn't say why"


def _advice(reason: str) -> str:
    if "libcuda.so" in reason or "nvcuda.dll" in reason:
        return "; the machine has no NVIDIA driver, or the container was started without its GPU"
    if re.search(r"lib(cu|nv)\w+\.so|(cu|nv)\w+\.dll", reason):
        return "; install CUDA and cuDNN, with pip: pip install 'onnxruntime-gpu[cuda,cudnn]'"
    return ""
