"""The same exported folder, as it is, in other runtimes: the same tokens as in ours."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peers
import pytest
from conftest import MakeCheckpoint, assert_same_tokens, load_reference, reference_tokens

import gpt2onnx
from gpt2onnx.models import contract
from gpt2onnx.models.bundle import GRAPH, WIDE_GRAPH, Bundle
from gpt2onnx.runtime.session import Session

TOKENS = 20
PROMPT = "Once upon a time"

OPTIMUM = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
folder, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model, tokenizer, found = ORTModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    found.append(output[0, inputs["input_ids"].shape[1]:].tolist())
print(json.dumps(found))
"""

GENAI = """
import json, sys
import onnxruntime_genai as genai
folder, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = genai.Model(folder)
tokenizer, found = genai.Tokenizer(model), []
for prompt in prompts:
    ids = tokenizer.encode(prompt)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    found.append([int(token) for token in generator.get_sequence(0)][len(ids):])
print(json.dumps(found))
"""

TRANSFORMERS_JS = """
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";
env.allowRemoteModels = false;
const [folder, prompts, count] = process.argv.slice(2);
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModelForCausalLM.from_pretrained(folder, { dtype: "fp32", device: "cpu" });
const found = [];
for (const prompt of JSON.parse(prompts)) {
  const inputs = tokenizer(prompt);
  const output = await model.generate({ ...inputs, max_new_tokens: Number(count), do_sample: false });
  found.push(Array.from(output.data, Number).slice(inputs.input_ids.dims[1]));
}
console.log(JSON.stringify(found));
"""

# None leads to a near tie in any precision: those are decided by how a prompt and rows are rounded together.
PROMPTS = [PROMPT, "Little Red Riding Hood", "A"]
PEERS = {
    "optimum": lambda *arguments: peers.run_python(OPTIMUM, *arguments),
    "onnxruntime-genai": lambda *arguments: peers.run_python(GENAI, *arguments),
    "transformers.js": lambda *arguments: peers.run_node(TRANSFORMERS_JS, *arguments),
}


BUNDLES = [
    "fp32", "fp16", "int8", "int4", "int4 pure",
    "heads of 12", "heads of 12, fp16", "heads of 12, int4, untied", "heads of 3, int8",
]  # fmt: skip


def json_list(prompts: list[str]) -> str:
    return "[" + ", ".join(f'"{prompt}"' for prompt in prompts) + "]"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    odd: dict[str, Any] = {"n_embd": 60, "n_head": 5, "vocab_size": 263, "n_layer": 3}
    untied = odd | {"tie_word_embeddings": False, "n_inner": 50}
    quick = {"quality": False, "calibrate": False}
    sources: dict[str, tuple[Any, dict[str, Any]]] = {
        "fp32": ("tales", {}),
        "fp16": ("tales", {"dtype": "fp16"}),
        "int8": ("tales", {"dtype": "int8"} | quick),
        "int4": ("tales", {"dtype": "int4", "quality": False}),
        "int4 pure": ("tales", {"dtype": "int4", "pure": True} | quick),
        "heads of 12": (make_checkpoint(**odd), {}),
        "heads of 12, fp16": (make_checkpoint(**odd), {"dtype": "fp16"}),
        "heads of 12, int4, untied": (make_checkpoint(**untied), {"dtype": "int4"} | quick),
        "heads of 3, int8": (make_checkpoint(n_embd=21, n_head=7, vocab_size=259), {"dtype": "int8"} | quick),
    }
    with pytest.MonkeyPatch.context() as patch:
        # What is calibrated then has its second graph beside the one that other runtimes are to find.
        export = import_module("gpt2onnx.exporter.export")
        patch.setattr(export, "_WIDE_WIDTH", 0)
        # It is the graphs that are looked at, not how well they do: fewer texts are enough, and much faster.
        patch.setattr(export, "_MORE_TEXTS", 4)
        made = {
            name: gpt2onnx.export(source, folder / name, **options).folder
            for name, (source, options) in sources.items()
        }
    assert (made["int4"] / WIDE_GRAPH).is_file()
    return made


@pytest.mark.parametrize("precision", BUNDLES)
@pytest.mark.parametrize("peer", PEERS)
def test_same_greedy_tokens(peer: str, precision: str, bundles: dict[str, Path]) -> None:
    found = PEERS[peer](bundles[precision], json_list(PROMPTS), TOKENS)
    ours = gpt2onnx.load(bundles[precision], threads=1).generate(PROMPTS, max_new_tokens=TOKENS, do_sample=False)
    for prompt, tokens, result in zip(PROMPTS, found, ours, strict=True):
        assert_same_tokens(tokens, result.sequences[0].token_ids, f"{peer}, {precision}, {prompt!r}")


@pytest.mark.parametrize("precision", BUNDLES)
def test_past_and_present_may_be_different_arrays(precision: str, bundles: dict[str, Path]) -> None:
    """As they are in other runtimes, from an empty past on; ours gives the graph one array for both."""
    folder = bundles[precision]
    graph = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    ours = Session(Bundle.open(folder), threads=1)
    config, cache = ours.config, ours.new_cache(1, 12)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(1, 12))
    names = [output.name for output in graph.get_outputs()]
    empty = np.zeros((1, config.n_head, 0, config.head_size), ours.dtype)
    past = {name: empty for layer in range(config.n_layer) for name in contract.past_names(layer)}
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 12)):
        feeds = {
            contract.INPUT_IDS: tokens[:, start:end],
            contract.ATTENTION_MASK: np.ones((1, end), np.int64),
            contract.POSITION_IDS: np.arange(start, end)[None],
        }
        found = dict(zip(names, graph.run(None, feeds | past), strict=True))
        past = {name.replace("present", "past_key_values"): found[name] for name in names if "present" in name}
        wanted = ours.forward(cache, slice(0, 1), tokens[:, start:end], keep=end - start)
        difference = np.abs(found[contract.LOGITS] - wanted).max()
        assert difference < 1e-4 * np.abs(wanted).max(), f"positions {start} to {end} differ by {difference}"


def test_what_the_peers_are_compared_with_is_right(bundles: dict[str, Path], tales_checkpoint: Path) -> None:
    model = gpt2onnx.load(bundles["fp32"], threads=1)
    reference = load_reference(tales_checkpoint)
    for prompt in PROMPTS:
        expected = reference_tokens(reference, model.tokenizer.encode(prompt), do_sample=False, max_new_tokens=TOKENS)
        found = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False).sequences[0].token_ids
        assert_same_tokens(found, expected[0], prompt)
