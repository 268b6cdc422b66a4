"""Results in notebooks: as text, as HTML, as a table of pandas."""

import html

import gpt2onnx
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


def test_names_of_the_package() -> None:
    assert {"load", "export", "to_pandas", "track_energy", "Model", "GenerationConfig", "Result", "__version__"} <= set(
        dir(gpt2onnx)
    )
