"""Ctrl-C: wherever it comes while requests are carried out, it ends the run. Code that clears an error would lose it."""

import json
import sys
from types import FrameType
from typing import Any

import gpt2onnx
from gpt2onnx.runtime import jobs

LINES = [
    json.dumps({"id": 0, "prompt": "Once", "max_new_tokens": 3}),
    json.dumps({"id": 1, "prompt": "The", "max_new_tokens": 3, "do_sample": True, "seed": 3, "top_k": 5, "stop": ["END"]}),
    json.dumps({"id": 2, "prompt": "A", "max_new_tokens": 3, "num_beams": 2}),
]  # fmt: skip


class Interruption:
    """Raises KeyboardInterrupt in a given call of a Python function, as Python itself does after a signal."""

    def __init__(self, call: int | None = None) -> None:
        self.call, self.calls, self.lost = call, 0, False

    def run(self, model: gpt2onnx.Model) -> int:
        """Carries out the lines; notes whether the interrupt was raised and lost. Returns the number of calls."""
        model.reset()
        sys.settrace(self._trace)
        try:
            for _ in jobs.run(model, LINES, model.generation_config):
                pass
            self.lost = self.call is not None and self.calls >= self.call
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return self.calls

    def _trace(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "<genexpr>":  # also an event when one is closed, where Python looks for no signal
            return
        self.calls += 1
        if self.calls == self.call:
            sys.settrace(None)
            raise KeyboardInterrupt


def test_ctrl_c_ends_a_run_wherever_it_comes(tales_model: gpt2onnx.Model) -> None:
    Interruption().run(tales_model)
    calls = Interruption().run(tales_model)
    assert calls > 500
    lost = []
    for call in range(1, calls + 1, 1 + calls // 100):
        interruption = Interruption(call)
        interruption.run(tales_model)
        lost += [call] * interruption.lost
    assert not lost
    assert len(list(jobs.run(tales_model, LINES, tales_model.generation_config))) == len(LINES)
