"""onnxruntime-genai on gpt2onnx's own bundle."""

import json
from importlib.metadata import version

import numpy as np
import onnxruntime_genai as genai

PAD = 50256  # the bundle's pad token, from which attention masks are made


class Driver:
    version = f"onnxruntime-genai {version('onnxruntime-genai')}, onnxruntime {version('onnxruntime')}"

    def load(self, model, precision, threads):
        config = genai.Config(model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = genai.Model(config)

    def can(self, task):
        return not task.prompt_lookup

    def generate(self, task):
        width = max(map(len, task.prompts))
        ids = np.array([[PAD] * (width - len(p)) + p for p in task.prompts], np.int32)
        length = width + task.new_tokens
        options = {"batch_size": len(task.prompts), "max_length": length, "min_length": length}
        if task.num_beams > 1:
            options |= {"num_beams": task.num_beams, "no_repeat_ngram_size": task.no_repeat_ngram_size}
        options["do_sample"] = task.sampling is not None
        if task.sampling:
            options |= {"temperature": task.sampling["temperature"], "top_p": task.sampling["top_p"]}
            options |= {"top_k": int(task.sampling["top_k"]), "random_seed": int(task.sampling["seed"])}
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(**options)
        generator = genai.Generator(self.model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return [generator.get_sequence(i)[width:].tolist() for i in range(len(task.prompts))]

    def first_token(self, model, text):
        tokenizer = genai.Tokenizer(self.model)
        ids = tokenizer.encode(text)
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(ids) + 1, do_sample=False)
        generator = genai.Generator(self.model, parameters)
        generator.append_tokens(ids)
        generator.generate_next_token()
        return tokenizer.decode(generator.get_sequence(0)[len(ids) :])
