"""CTranslate2."""

import json
from pathlib import Path

import ctranslate2


class Driver:
    version = f"ctranslate2 {ctranslate2.__version__}"

    def load(self, model, precision, threads):
        compute = {"fp32": "float32", "int8": "int8_float32"}[precision]
        self.model = ctranslate2.Generator(
            model, device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads
        )
        self.names = json.loads(Path(model, "vocabulary.json").read_text())

    def can(self, task):
        return not task.prompt_lookup

    def generate(self, task):
        options = {}
        if task.sampling:
            ctranslate2.set_random_seed(int(task.sampling["seed"]))
            options = {
                "sampling_topk": int(task.sampling["top_k"]),
                "sampling_topp": task.sampling["top_p"],
                "sampling_temperature": task.sampling["temperature"],
            }
        results = self.model.generate_batch(
            [[self.names[i] for i in prompt] for prompt in task.prompts],
            beam_size=task.num_beams,
            max_length=task.new_tokens,
            min_length=task.new_tokens,
            end_token=[],
            no_repeat_ngram_size=task.no_repeat_ngram_size,
            include_prompt_in_result=False,
            **options,
        )
        return [list(result.sequences_ids[0]) for result in results]

    def first_token(self, model, text):
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(Path(model, "tokenizer.json")))
        result = self.model.generate_batch(
            [tokenizer.encode(text).tokens], max_length=1, include_prompt_in_result=False
        )
        return tokenizer.decode(result[0].sequences_ids[0])
