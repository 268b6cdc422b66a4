"""What notebooks see: results as text, as HTML and as tables of pandas, a model taken apart and measured, progress."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from support.commands import CommandLine

import gpt2onnx
from gpt2onnx.errors import OptionError, OutputError, PromptError
from gpt2onnx.runtime.requests import GeneratedSequence, Result


def test_a_table_of_results(tales_model: gpt2onnx.Model) -> None:
    results = tales_model.generate(["Once upon", "The king"], num_beams=3, num_return_sequences=2, max_new_tokens=5)
    table = gpt2onnx.to_pandas(results)
    assert list(table["prompt"]) == ["Once upon", "Once upon", "The king", "The king"]
    assert list(table["text"]) == [sequence.text for result in results for sequence in result.sequences]
    assert list(table["score"]) == [sequence.score for result in results for sequence in result.sequences]
    assert set(table["tokens"]) == {5}
    assert table["seed"].isna().all()
    one = tales_model.generate("Once", seed=7, max_new_tokens=4)
    assert gpt2onnx.to_pandas(one).loc[0, ["seed", "tokens"]].tolist() == [7, 4]
    assert gpt2onnx.to_pandas([]).empty


def test_texts_of_a_result() -> None:
    result = Result("a <b>", [1], [GeneratedSequence(" & \n c", [2], "length", None)], 0.1)
    assert str(result) == " & \n c"
    assert result.full_text == "a <b> & \n c"
    page = result._repr_html_()
    assert "<b>" not in page
    assert html.escape("a <b>") in page
    assert html.escape(" & \n c") in page


@pytest.mark.parametrize("options", [{}, {"stop": ["a"]}, {"num_beams": 2}, {"seed": 3, "temperature": 3.0}], ids=str)
def test_tokens_are_shaded_by_their_probability(tales_model: gpt2onnx.Model, options: dict[str, Any]) -> None:
    result = tales_model.generate("The <b>", max_new_tokens=12, logprobs=0, **options)
    (sequence,) = result.sequences
    assert sequence.pieces is not None
    assert sequence.logprobs is not None
    whole = tales_model.tokenizer.decode(sequence.token_ids, skip_special_tokens=True)
    assert "".join(sequence.pieces) == whole
    page = result._repr_html_()
    assert html.unescape(re.sub("<[^>]*>", "", page)) == result.full_text
    shown = re.findall(r'rgba\(224, 130, 32, ([\d.]+)\)" title="([\d.]+)%"', page)
    expected = [math.exp(token.logprob) for token in sequence.logprobs]
    assert 0 < len(shown) <= len(expected)
    for (shade, percent), likely in zip(shown, expected, strict=False):
        assert float(percent) == pytest.approx(100 * likely, abs=0.06)
        assert float(shade) == pytest.approx(0.6 * (1 - likely), abs=0.006), "unlikely tokens are darker"
    assert "pieces" not in result.to_dict()["sequences"][0]


def test_names_of_the_package() -> None:
    names = {
        "load",
        "export",
        "sweep",
        "to_pandas",
        "track_energy",
        "Model",
        "GenerationConfig",
        "Result",
        "__version__",
    }
    assert names <= set(dir(gpt2onnx))


def test_a_model_shows_what_inspect_prints(
    tales_model: gpt2onnx.Model, tales_bundle: Path, command_line: CommandLine
) -> None:
    assert tales_model.parameters() == json.loads(command_line("inspect", tales_bundle, "--json").out)["parameters"]
    assert repr(tales_model.layers()) in command_line("inspect", tales_bundle).out
    described = repr(tales_model)
    for fact in ("tales", "6 layers", "fp32", "MB", "on cpu", "thread"):
        assert fact in described


def test_a_model_evaluates_and_shows_the_next_token(tales_model: gpt2onnx.Model) -> None:
    evaluation = tales_model.evaluate("Once upon a time there was a king.", split=0.5)
    table = gpt2onnx.to_pandas(evaluation)
    assert list(table["part"]) == ["train", "validation"]
    assert list(table["loss"]) == [loss.loss for loss in evaluation.parts.values()]
    for long in ("word " * 600, "word " * 100_000):
        with pytest.raises(PromptError, match=r"the context window 512.* or take model\.evaluate"):
            tales_model.score(long)
        assert tales_model.evaluate(long[:3000]).parts
    following = tales_model.next_token("Once upon a", temperatures=[0.5, 2], top_k=5, draws=20, seed=1)
    table = gpt2onnx.to_pandas(following)
    assert list(table["temperature"]) == [0.5] * 10 + [2] * 10
    assert table["piece"][0] == tales_model.generate("Once upon a", max_new_tokens=1).text
    for _, of_one in table.groupby("temperature"):
        assert of_one["probability"].sum() == pytest.approx(1)
        assert (of_one["drawn"].sum(), (of_one["probability"] > 0).sum()) == (20, 5)
    assert len(repr(following)) < 300


def test_a_sweep_from_python(tales_model: gpt2onnx.Model, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    runs = gpt2onnx.sweep(
        tales_model, "Once upon a time", grid={"num_beams": [1, 3]}, max_new_tokens=4, energy=False,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 2), (2, 2)]
    table = gpt2onnx.to_pandas(runs)
    assert list(table["strategy"]) == ["beams 1", "beams 3"]
    assert list(table["text"]) == [
        tales_model.generate("Once upon a time", num_beams=beams, max_new_tokens=4).text for beams in (1, 3)
    ]
    grids = {
        "strategies": [{"name": "a", "top_k": 3, "seed": 1}, {"name": "b"}],
        "file": {"prompts": ["Once"], "options": {"max_new_tokens": 2}, "strategy": [{"name": "a"}]},
    }
    kept = gpt2onnx.sweep(tales_model, "Once", grid=grids["strategies"], max_new_tokens=2, energy=False, out=tmp_path)
    assert (len(kept), kept.report) == (2, tmp_path / "report.html")
    assert {"results.jsonl", "report.html", "summary.csv"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="resume=True"):
        gpt2onnx.sweep(tales_model, "Once", grid=grids["strategies"], energy=False, out=tmp_path)
    assert [row["prompt"] for row in gpt2onnx.sweep(tales_model, grid=grids["file"], energy=False).rows()] == ["Once"]
    with pytest.raises(OptionError, match="a sweep needs a prompt"):
        gpt2onnx.sweep(tales_model, grid={"num_beams": [1, 2]}, energy=False)
    with pytest.raises(OptionError, match="the grid: strategy 'options': unknown generation option 'num_beam'"):
        gpt2onnx.sweep(tales_model, "Once", grid={"num_beam": 2}, energy=False)
