"""gpt2onnx."""

from importlib.metadata import version

import gpt2onnx
from gpt2onnx.runtime.requests import Request


class Driver:
    version = f"gpt2onnx {version('gpt2onnx')}, onnxruntime {version('onnxruntime')}"

    def load(self, model, precision, threads):
        self.model = gpt2onnx.load(model, threads=threads, cache_dtype=precision)

    def can(self, task):
        return True

    def generate(self, task):
        options = {
            "max_new_tokens": task.new_tokens,
            "eos_token_id": -1,
            "num_beams": task.num_beams,
            "no_repeat_ngram_size": task.no_repeat_ngram_size,
            "prompt_lookup": task.prompt_lookup,
            "do_sample": task.sampling is not None,
            **(task.sampling or {}),
        }
        options = self.model.generation_config.merged(options)
        requests = [Request(prompt, options, id=i) for i, prompt in enumerate(task.prompts)]
        rows = [[] for _ in requests]
        for request, result in self.model.complete(requests, batch_size=len(requests)):
            rows[request.id] = result.sequences[0].token_ids
        return rows
