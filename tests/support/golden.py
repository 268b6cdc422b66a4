"""Golden answers: what PyTorch and transformers answered, kept in tests/golden, so that tests need neither.

A test asks by a question, which is any JSON, and gives the function that computes the answer. `pytest --golden MODE` says where
the answer comes from:

    stored  the file that belongs to the test's module (the default); nothing is computed
    live    the function
    check   the function, and what is stored must agree: `make reference`
    write   the function, and the file is written anew: `make golden`
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

FOLDER = Path(__file__).parents[1] / "golden"
MADE_WITH = ("transformers", "torch", "tokenizers", "numpy")
# Entries kept of a larger array, at places drawn once for each size.
KEPT = 3000
# Largest difference between one machine's answer and another's: PyTorch's kernels round in an order of their own.
TOLERANCE = 2e-5

Mode = Literal["stored", "live", "check", "write"]
MODES: tuple[Mode, ...] = ("stored", "live", "check", "write")


@dataclass
class _Module:
    """The answers of one test module: JSON ones, and arrays."""

    stem: str
    values: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, stem: str) -> _Module:
        module = cls(stem)
        if module.json_path.is_file():
            module.values = json.loads(module.json_path.read_text("utf-8"))["answers"]
        if module.npz_path.is_file():
            with np.load(module.npz_path) as arrays:
                module.arrays = dict(arrays)
        return module

    @property
    def json_path(self) -> Path:
        return FOLDER / f"{self.stem}.json"

    @property
    def npz_path(self) -> Path:
        return FOLDER / f"{self.stem}.npz"

    def write(self, *, whole: bool) -> None:
        """Writes both files; answers that nobody asked for go where the whole module was run."""
        if whole:
            self.values = {key: value for key, value in self.values.items() if key in self.asked}
            self.arrays = {key: value for key, value in self.arrays.items() if key in self.asked}
        FOLDER.mkdir(exist_ok=True)
        made_with = {"python": platform.python_version(), "machine": platform.machine()}
        made_with |= {name: version(name) for name in MADE_WITH}
        lines = [f"{json.dumps(key)}: {json.dumps(self.values[key])}" for key in sorted(self.values)]
        text = f'{{"made_with": {json.dumps(made_with)},\n"answers": {{\n' + ",\n".join(lines) + "\n}}\n"
        self.json_path.write_text(text, "utf-8")
        if self.arrays:
            np.savez_compressed(self.npz_path, **{key: self.arrays[key] for key in sorted(self.arrays)})
        else:
            self.npz_path.unlink(missing_ok=True)


class Golden:
    """All modules' answers in one run of pytest."""

    def __init__(self) -> None:
        self.mode: Mode = "stored"
        self._modules: dict[str, _Module] = {}

    def answer(self, question: object, live: Callable[[], Any]) -> Any:
        """The answer, which is JSON: tokens, texts, figures."""
        module, key = self._place(question)
        if self.mode == "stored":
            return self._stored(module.values, key, question)
        found = json.loads(json.dumps(live()))
        if self.mode == "check":
            kept = self._stored(module.values, key, question)
            assert _agree(found, kept), f"{question}: PyTorch answers {found}, stored is {kept}"
        if self.mode == "write" and not _agree(found, module.values.get(key)):
            assert key not in module.asked, f"two questions alike in {module.stem}: {question}"
            module.values[key] = found
        module.asked.add(key)
        return found

    def array(self, question: object, live: Callable[[], np.ndarray]) -> np.ndarray:
        """The answer, an array of floats. A larger one is stored as a sample of KEPT entries; the others are NaN."""
        module, key = self._place(question)
        if self.mode == "stored":
            return self._whole(module, key, question)
        found = np.asarray(live())
        if self.mode == "check":
            assert_close(found, self._whole(module, key, question), TOLERANCE, f"PyTorch's answer to {question}")
        if self.mode == "write" and not self._as_stored(found, module, key):
            assert key not in module.asked, f"two questions alike in {module.stem}: {question}"
            module.values[key] = {"shape": found.shape}
            module.arrays[key] = found.reshape(-1)[_places(found.size)]
        module.asked.add(key)
        return found

    def finish(self, *, whole: bool) -> None:
        """Writes what was asked. Modules that ran whole lose the answers that nobody asked for."""
        for module in self._modules.values():
            module.write(whole=whole)

    def _place(self, question: object) -> tuple[_Module, str]:
        """The module of the test that runs, and the name under which it keeps the answer."""
        stem = Path(os.environ["PYTEST_CURRENT_TEST"].split("::")[0]).stem.removeprefix("test_")
        if stem not in self._modules:
            self._modules[stem] = _Module.read(stem)
        return self._modules[stem], hashlib.sha256(json.dumps(question).encode()).hexdigest()[:12]

    @staticmethod
    def _stored(values: dict[str, Any], key: str, question: object) -> Any:
        assert key in values, f"tests/golden has no answer to {json.dumps(question)[:300]}: run 'make golden'"
        return values[key]

    def _whole(self, module: _Module, key: str, question: object) -> np.ndarray:
        shape = self._stored(module.values, key, question)["shape"]
        part = module.arrays[key]
        whole = np.full(int(np.prod(shape)), np.nan, part.dtype)
        whole[_places(whole.size)] = part
        return whole.reshape(shape)

    def _as_stored(self, found: np.ndarray, module: _Module, key: str) -> bool:
        if key not in module.arrays:
            return False
        kept = self._whole(module, key, key)
        return found.shape == kept.shape and bool(
            np.allclose(found[~np.isnan(kept)], kept[~np.isnan(kept)], 1e-6, TOLERANCE)
        )


golden = Golden()


def _places(size: int) -> np.ndarray:
    """Which entries of so large an array are kept, rising."""
    if size <= KEPT:
        return np.arange(size)
    return np.sort(np.random.RandomState(size % 2**32).permutation(size)[:KEPT])


def _agree(one: Any, other: Any) -> bool:
    """Equal, numbers with a fraction up to rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, 1e-5, TOLERANCE, equal_nan=True))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_agree, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_agree(one[key], other[key]) for key in one)
    return bool(one == other)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, label: str = "") -> None:
    """Fails with the largest difference; entries of `expected` that are NaN aren't known."""
    assert actual.shape == expected.shape, f"{label}: {actual.shape}, expected {expected.shape}"
    known = ~np.isnan(expected)
    assert known.any() or not expected.size, f"{label}: nothing is known of what is expected"
    assert not np.isnan(actual).any(), f"{label}: NaN"
    with np.errstate(invalid="ignore"):
        difference = np.where(known & (actual != expected), np.abs(actual - expected), 0)
    worst = np.unravel_index(int(difference.argmax()), difference.shape)
    assert difference[worst] <= tolerance, (
        f"{label}: differs by up to {difference[worst]:.3g}, at {tuple(map(int, worst))}, allowed are {tolerance:.3g}"
    )


def digest(numbers: Iterable[int]) -> str:
    """Stands for many whole numbers in a golden file."""
    return hashlib.sha256(np.array(list(numbers), np.int64).tobytes()).hexdigest()[:16]
