"""The guide's examples are what the commands print, where PyTorch isn't installed; and what the docs say of others is true."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.golden import Golden
from support.isolated import COMMAND_LINE, REFERENCES, run
from support.paths import DOCS

GUIDE = DOCS / "guide.md"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")

# cog prints the guide as it would write it.
COG = f"""
import os
from cogapp import Cog
os.chdir({str(DOCS.parent)!r})
sys.exit(Cog().main(["cog", {str(GUIDE.relative_to(DOCS.parent))!r}]))
"""


def words_and_numbers(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each line's words, with spaces as one and numbers left out, and its numbers."""
    for line in text.splitlines():
        yield " ".join(NUMBER.sub("#", line).split()), NUMBER.findall(line)


def one_in_the_last_digit(number: str) -> float:
    digits, _, exponent = number.replace(",", "").partition("e")
    decimals = len(digits.partition(".")[2])
    # Counts are exact. Other figures may be rounded otherwise where another processor adds in another order.
    return 1.01 * 10.0 ** (int(exponent or 0) - decimals) if decimals else 0.0


def test_examples_are_what_the_commands_print_without_pytorch(tmp_path: Path) -> None:
    code, out, err = run(COG, without=REFERENCES, OMP_NUM_THREADS="1", HOME=str(tmp_path))
    assert (code, err) == (0, "")
    written = GUIDE.read_text(encoding="utf-8")
    assert len(out.splitlines()) == len(written.splitlines()), "run 'make docs'"
    for (words, numbers), (old_words, old_numbers) in zip(
        words_and_numbers(out), words_and_numbers(written), strict=True
    ):
        assert words == old_words, "run 'make docs'"
        for number, old in zip(numbers, old_numbers, strict=True):
            difference = abs(float(number.replace(",", "")) - float(old.replace(",", "")))
            assert difference <= one_in_the_last_digit(old), f"{number}, the guide says {old}: run 'make docs'"


def test_every_step_has_its_section() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert len(links) >= 8
    assert set(links) <= headings
    for file in re.findall(r"\]\((?!#|https?:)([^)#]*)", text):
        assert (DOCS / file).is_file(), file


def blocks(language: str, section: str) -> list[str]:
    text = GUIDE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.system
def test_the_energy_example_runs(tmp_path: Path) -> None:
    """For one width, and measured once: what it shows of time and energy is no two runs' the same."""
    (loop,) = blocks("sh", "Energy")
    (command,) = [line.strip() for line in loop.splitlines() if "gpt2onnx" in line]
    arguments = shlex.split(command.replace("$beams", "2"))[1:]
    code, out, err = run(
        f"import os; os.chdir({str(tmp_path)!r}); {COMMAND_LINE}", *arguments, "--energy-seconds", 0, without=REFERENCES
    )
    assert (code, err) == (0, "")
    assert out.strip()
    (code_block,) = blocks("python", "Energy")
    code, out, err = run(f"import os; os.chdir({str(tmp_path)!r})\n{code_block}", without=REFERENCES)
    assert (code, err) == (0, "")
    (shown,) = blocks("text", "Energy")
    assert out.split()[: out.split().index("0")] == shown.split()[: shown.split().index("0")], "the columns"
    assert "beam search" in out


def parameters(name: str) -> int:
    """Of a model of its usual size, by transformers."""
    import torch
    import transformers

    bart = {f"{stack}_{what}": value for stack in ("encoder", "decoder") for what, value in
            {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}.items()}  # fmt: skip
    models: dict[str, tuple[Any, Any]] = {
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config()),
        "bert-base-uncased": (transformers.BertModel, transformers.BertConfig()),
        "bart-base": (
            transformers.BartForConditionalGeneration,
            transformers.BartConfig(vocab_size=50265, d_model=768, **bart),
        ),
        "t5-base": (
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
        ),
    }
    model, config = models[name]
    with torch.device("meta"):
        return int(model(config).num_parameters())


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "bart-base", "t5-base"])
def test_sizes_of_other_architectures(name: str, golden: Golden) -> None:
    header, *rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in (DOCS / "architectures.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    (column,) = [index for index, cell in enumerate(header) if f"`{name}`" in cell]
    (row,) = [row for row in rows if row[0] == "parameters"]
    assert row[column].split()[0] == f"{golden.answer(name, lambda: parameters(name)):,}"
