"""The examples of the README and of docs run as they stand; messages that the docs explain are those of the code."""

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import run
from support.paths import DOCS, README, REPOSITORY
from support.systems import posix

# Parts the output of one example from the next one's.
MARK = "-- next example --"


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's examples read."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "docs").mkdir()
    shutil.copy(README.parent / "docs" / "the-verdict.txt", folder / "docs")
    (requests,) = blocks("json")
    (folder / "requests.jsonl").write_text(requests, encoding="utf-8")
    return folder


@posix
@pytest.mark.system
def test_shell_examples_run(workplace: Path) -> None:
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    run = 0
    for command in commands:
        if not command or command.startswith(("pip ", "python3 -m venv ")):
            continue
        if command.startswith("gpt2onnx sweep "):
            command += " --max-new-tokens 4"  # the guide's test makes the same sweep of longer texts
        local = re.sub(r"\bgpt2onnx\b(?=\s)", f"{shlex.quote(sys.executable)} -m gpt2onnx", command)
        done = subprocess.run(local, shell=True, cwd=workplace, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip() or "--output" in command, command
        run += 1
    assert run >= 5
    results = (workplace / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(results) == len(blocks("json")[0].strip().splitlines())
    assert not [line for line in results if '"error"' in line]


@pytest.mark.system
@pytest.mark.parametrize("page", [README, *(DOCS / f"{name}.md" for name in ("extend", "from-transformers", "python"))])
def test_python_examples_print_what_the_page_shows(page: Path, workplace: Path) -> None:
    """One after another, as a reader would; what a block prints stands below it."""
    examples = re.findall(
        r"^```python\n(.*?)^```$(?:\n\nprints\n\n```text\n(.*?)^```$)?",
        page.read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    assert examples
    code = f"print({MARK!r})\n".join(code for code, _ in examples)
    done = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for (_, shown), printed in zip(examples, done.stdout.split(f"{MARK}\n"), strict=True):
        assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    # Literals that stand one below the other are one message.
    source = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        for path in REPOSITORY.glob("*/**/*.py")
        if path.relative_to(REPOSITORY).parts[0] not in {"build", "tests", ".venv", ".refenv"}
    )
    messages = re.findall(r"^\| `(.*?)` \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(messages) >= 20
    for message in messages:
        for part in message.split("…"):
            assert part in source, message


@pytest.mark.system
def test_the_demo_tells_the_story_of_the_readme(tmp_path: Path) -> None:
    recipe = (README.parent / "Makefile").read_text(encoding="utf-8").partition("\ndemo:")[2].partition("\n\n")[0]
    commands = re.findall(r"^\t@\$\(BIN\)/gpt2onnx (.*)$", recipe, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        done = run(*shlex.split(command), cwd=tmp_path, encoding="utf-8")
        assert done.code == 0, done.err
    story = re.findall(r"^>(.*)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert done.out.splitlines() == [line.strip() for line in story]


def test_the_speeds_of_the_readme_are_those_of_the_benchmarks() -> None:
    scenarios = {
        "a single text": "batch 1",
        "sampling": "sampling",
        "beam search": "beam 6",
        "a batch of 8": "batch 8",
        "a batch of 16": "batch 16",
        "a prompt of 512 tokens": "prefill 512",
        "prompt lookup in a text that repeats itself": "lookup, repetitive",
    }
    report = rows(DOCS / "benchmarks" / "README.md", "gpt2onnx against the best peer of its class")
    places = {scenario: report[0].index(scenario) for scenario in scenarios.values()}
    measured = {line[0]: line for line in report[2:]}
    head, _, *lines = rows(README, "by that of the fastest")
    assert [line[0] for line in lines] == list(scenarios)
    for name, *cells in lines:
        for precision, cell in zip(head[1:], cells, strict=True):
            contender = f"gpt2onnx {precision.replace('`--pure`', 'pure')}, class {precision.split()[0]}"
            found = measured[contender][places[scenarios[name]]].split()[0]
            assert cell == ("" if found == "\N{EN DASH}" else found), (name, precision)


def test_the_speeds_with_avx512_are_those_of_the_benchmarks() -> None:
    head, _, *lines = rows(DOCS / "benchmarks/avx512-vnni/README.md", "gpt2onnx against the best peer of its class")
    measured = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    classes = [f"gpt2onnx {each}, class {each.split()[0]}" for each in ("fp32", "int8", "int4", "int4 pure")]

    def found(scenario: str, *contenders: str) -> list[str]:
        return [measured[each][scenario].split()[0] for each in contenders]

    one, (fp32, int8) = found("batch 1", *classes), found("beam 6", *classes[:2])
    others = [each for name in ("batch 8", "batch 16", "prefill 512", "prefill 960") for each in found(name, *classes)]
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"a single text is at {', '.join(one[:3])} and {one[3]} of the fastest" in text
    assert f"beam search at {fp32} and {int8}, batches and long prompts at {min(others)} to {max(others)}." in text


def rows(page: Path, before: str) -> list[list[str]]:
    """The cells of the first table behind a text."""
    lines = page.read_text(encoding="utf-8").partition(before)[2].splitlines()
    table = itertools.takewhile(
        lambda line: line.startswith("|"), itertools.dropwhile(lambda line: line[:1] != "|", lines)
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
