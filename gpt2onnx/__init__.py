"""GPT-2 on any machine, without PyTorch: export a checkpoint to ONNX once, then generate with NumPy.

    import gpt2onnx

    gpt2onnx.export("gpt2", "gpt2-int8", dtype="int8")
    model = gpt2onnx.load("gpt2-int8")
    print(model.generate("Once upon a time", do_sample=True, top_p=0.9, seed=1).text)

Names are loaded when they are first used, so importing the package costs nothing.
"""

import os.path
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Below this folder only in the installed package, where mypy checks it.
    from .exporter.export import export as export  # pyright: ignore[reportMissingImports]
    from .loading import load as load
    from .runtime.energy import track_energy as track_energy  # pyright: ignore[reportMissingImports]
    from .runtime.generator import Model as Model  # pyright: ignore[reportMissingImports]
    from .runtime.options import GenerationConfig as GenerationConfig  # pyright: ignore[reportMissingImports]
    from .runtime.results import Result as Result  # pyright: ignore[reportMissingImports]

# Started in a clone of the repository, Python finds this folder before the installed package, and the others beside it.
_CLONE = os.path.dirname(__path__[0])  # noqa: PTH120  # pathlib takes longer to import than all of this
if os.path.isfile(os.path.join(_CLONE, "pyproject.toml")):  # noqa: PTH113, PTH118
    __path__.append(_CLONE)

_HOME = {
    "export": "exporter.export",
    "load": "loading",
    "Model": "runtime.generator",
    "Result": "runtime.results",
    "GenerationConfig": "runtime.options",
    "track_energy": "runtime.energy",
}

__all__ = ["GenerationConfig", "Model", "Result", "export", "load", "track_energy"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
