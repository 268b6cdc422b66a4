"""How users call the package, for mypy alone (`make types`): an ignored error that is none would be an error there."""

from typing import Any, assert_type

import gpt2onnx
from gpt2onnx import Result

model = gpt2onnx.load("tales")
assert_type(model.generate("Once upon a time", temperature=0.7, top_k=None), Result)
assert_type(model.generate([1, 2, 3]), Result)
assert_type(model.generate(["Once", "Then"], batch_size=2), list[Result])
assert_type(model.generate([[1, 2], [3]]), list[Result])
assert_type(list(model.stream("Once")), list[str])
assert_type(model.tokenizer("Once").input_ids, Any)
assert_type(model.tokenizer.convert_tokens_to_ids("Once"), int | None)
model.generate(**model.tokenizer("Once"), max_new_tokens=5)
model.generate([[0, 1], [2, 3]], attention_mask=[[0, 1], [1, 1]])
model.generate("Once", temprature=0.7)  # type: ignore[call-overload]
model.generate("Once", top_k="many")  # type: ignore[call-overload]
model.stream("Once", num_beam=2)  # type: ignore[call-arg]
model.stream("Once", max_new_tokens=2.5)  # type: ignore[arg-type]
