"""What gpt2onnx must do alike whatever versions of its dependencies are installed: prints tokens and scores as JSON.

Run with the interpreter of the environment in question and an empty folder to work in. Knows neither pytest nor PyTorch.
"""

import json
import sys
from pathlib import Path
from typing import Any

import gpt2onnx
from support.checkpoints import random_checkpoint

EXPORTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "int8": {"dtype": "int8"},
    "int8 in blocks of 32": {"dtype": "int8", "block_size": 32, "quality": False},
    "int4": {"dtype": "int4", "calibrate": False},
    "int4, pure": {"dtype": "int4", "pure": True, "quality": False},
}
# Weights of other types and shapes, whose graphs have other operators than those of `tales`.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "heads of 12, untied": {"n_embd": 60, "n_head": 5, "n_inner": 50, "vocab_size": 97, "tie_word_embeddings": False},
    "quick_gelu": {"activation_function": "quick_gelu", "scale_attn_by_inverse_layer_idx": True},
    "mish": {"activation_function": "mish", "scale_attn_weights": False},
    "bfloat16": {"torch_dtype": "bfloat16", "activation_function": "gelu"},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 4, "no_repeat_ngram_size": 3},
    "sampling": {"do_sample": True, "top_k": 50, "top_p": 0.9, "temperature": 0.8, "seed": 1},
    "penalties": {"repetition_penalty": 1.3, "bad_words_ids": [[262]], "min_new_tokens": 5},
}
PROMPTS = ["Once upon a time", "The old king said:", "A"]


def results(folder: Path) -> dict[str, Any]:
    """Tokens of every export and strategy, and what each export says of a text."""
    found: dict[str, Any] = {}
    for name, options in EXPORTS.items():
        bundle = gpt2onnx.export("tales", folder / name, **options)
        if bundle.manifest.quality is not None:
            found[f"quality of {name}"] = bundle.manifest.quality
        model = gpt2onnx.load(bundle.folder, threads=1)
        for strategy, settings in STRATEGIES.items():
            done = model.generate(PROMPTS, max_new_tokens=24, batch_size=2, **settings)
            found[f"{name}, {strategy}"] = [result.sequences[0].token_ids for result in done]
        found[f"{name}, text"] = "".join(model.stream(PROMPTS[0], max_new_tokens=24))
        found[f"score in {name}"] = model.score("Once upon a time there was a little girl.").perplexity
    for name, config in CHECKPOINTS.items():
        bundle = gpt2onnx.export(random_checkpoint(folder / f"{name} checkpoint", config, 1), folder / name)
        model = gpt2onnx.load(bundle.folder, threads=1)
        (result,) = model.generate([[1, 2, 3]], max_new_tokens=24, do_sample=False)
        found[name] = result.sequences[0].token_ids
    return found


if __name__ == "__main__":
    json.dump(results(Path(sys.argv[1])), sys.stdout)
