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
    from .experiments.energy.tracker import track_energy as track_energy
    from .experiments.frames import to_pandas as to_pandas
    from .experiments.sweep import sweep as sweep
    from .exporter.export import export as export
    from .loading import load as load
    from .model import Model as Model
    from .runtime.options import GenerationConfig as GenerationConfig
    from .runtime.requests import Result as Result

    __version__: str

# Started in a clone of the repository, Python finds this folder before the installed package, and the others beside it.
_CLONE = os.path.dirname(__path__[0])  # noqa: PTH120  # pathlib takes longer to import than all of this
if os.path.isfile(os.path.join(_CLONE, "pyproject.toml")):  # noqa: PTH113, PTH118
    __path__.append(_CLONE)

_HOME = {
    "export": "exporter.export",
    "load": "loading",
    "Model": "model",
    "Result": "runtime.requests",
    "GenerationConfig": "runtime.options",
    "sweep": "experiments.sweep",
    "to_pandas": "experiments.frames",
    "track_energy": "experiments.energy.tracker",
}

__all__ = ["GenerationConfig", "Model", "Result", "__version__", "export", "load", "sweep", "to_pandas", "track_energy"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("gpt2onnx")
    elif name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({"__doc__", "__name__", "__path__", "__version__", *__all__})
