"""The lowest versions that pyproject.toml allows do what the newest do.

The environment variable GPT2ONNX_LOWEST names the interpreter of an environment that has exactly those: `make lowest`
makes it. Where the variable isn't set, these tests are skipped.
"""

import json
import math
import os
import subprocess
import sys
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.paths import REPOSITORY
from support.tokens import assert_same_tokens

EXTRAS = ("cpu", "export", "energy", "sweep")
# ONNX Runtime's kernels of low precision round in other ways in each of its versions, and so a near tie may
# end otherwise. What holds is how well a bundle does.
LOW_PRECISION = ("int8", "int4")
LISTING = """
import json
from importlib.metadata import distributions
print(json.dumps({one.metadata["Name"]: one.version for one in distributions()}))
"""


@pytest.fixture(scope="module")
def lowest() -> str:
    interpreter = os.environ.get("GPT2ONNX_LOWEST")
    if not interpreter:
        pytest.skip("needs an environment of the lowest versions: run 'make lowest'")
    return interpreter


def run(interpreter: str, *arguments: object) -> Any:
    """Runs a program that prints JSON."""
    command = [interpreter, "-W", "error", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "tests")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results(lowest: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the lowest and what the newest versions give."""
    script = REPOSITORY / "tests" / "support" / "essentials.py"
    found = [run(each, script, tmp_path_factory.mktemp("essentials")) for each in (lowest, sys.executable)]
    return found[0], found[1]


def test_environment_has_exactly_the_lowest_versions(lowest: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    requirements = [Requirement(line) for line in lines]
    installed = {canonicalize_name(name): Version(version) for name, version in run(lowest, "-c", LISTING).items()}
    bounds = {}
    for requirement in requirements:
        if requirement.name == "gpt2onnx":
            continue
        (bound,) = [one for one in requirement.specifier if one.operator == ">="]
        bounds[canonicalize_name(requirement.name)] = Version(bound.version)
    assert len(bounds) > 10
    found = {name: installed.get(name) for name in bounds}
    assert found == bounds
    assert {"torch", "transformers"} & set(installed) == set()


def test_same_tokens(results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    lowest, newest = results
    assert lowest.keys() == newest.keys()
    compared = 0
    for name, expected in newest.items():
        if isinstance(expected, list) and not name.startswith(LOW_PRECISION):
            alone = isinstance(expected[0], int)
            for one, other in [(lowest[name], expected)] if alone else zip(lowest[name], expected, strict=True):
                assert_same_tokens(one, other, name)
                compared += len(other)
    assert compared > 600


def test_same_quality(results: tuple[dict[str, Any], dict[str, Any]]) -> None:
    lowest, newest = results
    difference = abs(lowest["score in fp32"] / newest["score in fp32"] - 1)
    assert difference < 1e-5, f"perplexity {lowest['score in fp32']:.6f}, {newest['score in fp32']:.6f} in the newest"
    compared = [name for name in newest if name.startswith("quality")]
    assert len(compared) == 2
    for name in compared:
        old, new = lowest[name], newest[name]
        # Where they are calibrated, each on texts of its own, they are rounded differently, and over so few tokens the rise
        # of perplexity scatters by sqrt(2 KL / tokens); see docs/export.md.
        scatter = math.sqrt(2 * (old["kl"] + new["kl"]) / new["tokens"])
        difference = abs(math.log(old["perplexity"] / new["perplexity"]))
        assert difference < 4 * scatter, f"{name}: perplexity {old['perplexity']:.4f}, {new['perplexity']:.4f}"
        assert 2 / 3 < old["kl"] / new["kl"] < 3 / 2, f"{name}: KL {old['kl']:.5f}, {new['kl']:.5f}"
