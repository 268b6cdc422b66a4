"""OpenVINO GenAI."""

import numpy as np
import openvino
import openvino_genai


class Driver:
    version = f"openvino-genai {openvino_genai.__version__}"

    def load(self, model, precision, threads):
        self.model = model
        self.options = {"INFERENCE_NUM_THREADS": threads}
        if precision == "f32":  # OpenVINO's default: bf16 if the processor has it
            self.options["INFERENCE_PRECISION_HINT"] = "f32"
        self.pipeline = openvino_genai.LLMPipeline(model, "CPU", **self.options)
        self.lookup = None

    def can(self, task):
        return True

    def generate(self, task):
        width = max(map(len, task.prompts))
        ids = np.array([[0] * (width - len(p)) + p for p in task.prompts], np.int64)
        mask = np.array([[0] * (width - len(p)) + [1] * len(p) for p in task.prompts], np.int64)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = task.new_tokens
        config.ignore_eos = True
        config.num_beams = task.num_beams
        if task.no_repeat_ngram_size:
            config.no_repeat_ngram_size = task.no_repeat_ngram_size
        if task.sampling:
            config.do_sample = True
            config.temperature = task.sampling["temperature"]
            if task.sampling["top_k"]:
                config.top_k = int(task.sampling["top_k"])
            config.top_p = task.sampling["top_p"]
            config.rng_seed = int(task.sampling["seed"])
        pipeline = self.pipeline
        if task.prompt_lookup:
            config.num_assistant_tokens = task.prompt_lookup
            config.max_ngram_size = 3
            if self.lookup is None:
                self.lookup = openvino_genai.LLMPipeline(self.model, "CPU", prompt_lookup=True, **self.options)
            pipeline = self.lookup
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
        return [list(row) for row in pipeline.generate(inputs, config).tokens]

    def first_token(self, model, text):
        return str(self.pipeline.generate(text, max_new_tokens=1, apply_chat_template=False))
