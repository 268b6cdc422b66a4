"""transformers in PyTorch."""

import torch
import transformers

transformers.utils.logging.set_verbosity_error()


class Driver:
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def load(self, model, precision, threads):
        torch.set_num_threads(threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def can(self, task):
        return not (task.prompt_lookup and len(task.prompts) > 1)

    def generate(self, task):
        width = max(map(len, task.prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in task.prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in task.prompts])
        options = {
            "max_new_tokens": task.new_tokens,
            "min_new_tokens": task.new_tokens,
            "num_beams": task.num_beams,
            "no_repeat_ngram_size": task.no_repeat_ngram_size,
            "pad_token_id": 0,
            "do_sample": False,
        }
        if task.prompt_lookup:
            options["prompt_lookup_num_tokens"] = task.prompt_lookup
        if task.sampling:
            sampling = dict(task.sampling)
            torch.manual_seed(int(sampling.pop("seed")))
            options |= {"do_sample": True, **sampling}
        with torch.inference_mode():
            output = self.model.generate(input_ids=ids, attention_mask=mask, **options)
        return output[:, width:].tolist()

    def first_token(self, model, text):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        inputs = tokenizer(text, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
