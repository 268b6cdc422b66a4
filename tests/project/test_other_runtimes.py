"""The same exported folder, as it is, in other runtimes: the same tokens as in ours, or logits as far off as rounding explains."""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from support import peers
from support.checkpoints import MakeCheckpoint
from support.golden import assert_close
from support.quantized import compute_in_float32, few_texts
from support.reference import Reference
from support.tokens import assert_same_tokens

import gpt2onnx
from gpt2onnx.models import contract
from gpt2onnx.models.bundle import GRAPH, SECOND_GRAPH, TOKENIZER, Bundle
from gpt2onnx.runtime.engine.runner import Runner
from gpt2onnx.runtime.text.tokenizer import Tokenizer

TOKENS = 20
PROMPT = "Once upon a time"

# Each prints the tokens and writes the logits that they were chosen by, float32 [tokens of all prompts, vocabulary].
OPTIMUM = """
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
folder, logits, prompts, count = sys.argv[1], open(sys.argv[2], "wb"), json.loads(sys.argv[3]), int(sys.argv[4])
model, tokenizer, found = ORTModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": count, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**inputs, **options)
    found.append(output.sequences[0, inputs["input_ids"].shape[1]:].tolist())
    logits.write(torch.cat(output.logits).float().numpy().tobytes())
logits.close()
print(json.dumps(found))
"""

GENAI = """
import json, sys
import onnxruntime_genai as genai
folder, logits, prompts, count = sys.argv[1], open(sys.argv[2], "wb"), json.loads(sys.argv[3]), int(sys.argv[4])
model = genai.Model(folder)
tokenizer, found = genai.Tokenizer(model), []
for prompt in prompts:
    ids = tokenizer.encode(prompt)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        logits.write(generator.get_logits()[0, -1].astype("float32").tobytes())
        generator.generate_next_token()
    found.append([int(token) for token in generator.get_sequence(0)][len(ids):])
logits.close()
print(json.dumps(found))
"""

TRANSFORMERS_JS = """
import { writeFileSync } from "node:fs";
import { AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, env } from "@huggingface/transformers";
env.allowRemoteModels = false;
const [folder, file, prompts, count] = process.argv.slice(2);
const logits = [];
class Recorder extends LogitsProcessor {
  _call(ids, row) {
    logits.push(Float32Array.from(row.data));
    return row;
  }
}
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModelForCausalLM.from_pretrained(folder, { dtype: "fp32", device: "cpu" });
const found = [];
for (const prompt of JSON.parse(prompts)) {
  const inputs = tokenizer(prompt);
  const logits_processor = new LogitsProcessorList();
  logits_processor.push(new Recorder());
  const output = await model.generate({ ...inputs, max_new_tokens: Number(count), do_sample: false, logits_processor });
  found.push(Array.from(output.data, Number).slice(inputs.input_ids.dims[1]));
}
writeFileSync(file, Buffer.concat(logits.map((row) => Buffer.from(row.buffer))));
console.log(JSON.stringify(found));
"""

PROMPTS = [PROMPT, "Little Red Riding Hood", "A"]
PEERS = {
    "optimum": (peers.python, peers.run_python, OPTIMUM),
    "onnxruntime-genai": (peers.python, peers.run_python, GENAI),
    "transformers.js": (peers.node, peers.run_node, TRANSFORMERS_JS),
}

ODD: dict[str, Any] = {"n_embd": 60, "n_head": 5, "vocab_size": 263, "n_layer": 3}
QUICK = {"quality": False, "calibrate": False}
# What each bundle is made of: the embedded checkpoint or a random one, and the options of its export.
BUNDLES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "fp32": (None, {}),
    "fp16": (None, {"dtype": "fp16"}),
    "int8": (None, {"dtype": "int8"} | QUICK),
    "int4": (None, {"dtype": "int4", "quality": False}),
    "int4 pure": (None, {"dtype": "int4", "pure": True} | QUICK),
    "heads of 12": (ODD, {}),
    "heads of 12, fp16": (ODD, {"dtype": "fp16"}),
    "heads of 12, int4, untied": (
        ODD | {"tie_word_embeddings": False, "n_inner": 50, "weights_seed": 1},
        {"dtype": "int4"} | QUICK,
    ),
    "heads of 3, int8": ({"n_embd": 21, "n_head": 7, "vocab_size": 259}, {"dtype": "int8"} | QUICK),
    "heads of 8, int8": ({}, {"dtype": "int8", "quality": False}),
}
# Their second graphs lie beside the ones that other runtimes are to find. The first takes half a minute to export.
CALIBRATED = ["int4", "heads of 8, int8"]
# Of those that round, what doesn't: the same weights in fp32, or the same quantised weights and unrounded inputs.
UNROUNDED = {"fp16": "fp32", "heads of 12, fp16": "heads of 12"} | dict.fromkeys(
    name for name, (_, options) in BUNDLES.items() if options.get("dtype", "").startswith("int")
)

BundleOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> BundleOf:
    """Exports a bundle by its name, once."""
    folder = tmp_path_factory.mktemp("bundles")

    @functools.cache
    def bundle_of(name: str) -> Path:
        settings, options = BUNDLES[name]
        # The graphs are looked at, not their quality: fewer texts are enough, and much faster.
        with few_texts(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("gpt2onnx.exporter.graph.second_graph.MIN_WIDTH", 0)
            source = "tales" if settings is None else make_checkpoint(**settings)
            made = gpt2onnx.export(source, folder / name, **options).folder
        assert (made / SECOND_GRAPH).is_file() == (name in CALIBRATED or "dtype" not in options)
        return made

    return bundle_of


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> str:
    """A peer's name; before anything is exported for it, its environment is made."""
    environment, _, _ = PEERS[request.param]
    environment()
    return request.param


@dataclass(frozen=True)
class Answer:
    """What a peer gives: tokens of each prompt, and the logits that they were chosen by, float32 [tokens, vocabulary]."""

    tokens: list[list[int]]
    logits: np.ndarray

    @classmethod
    def ask(cls, peer: str, folder: Path, file: Path) -> "Answer":
        _, run, program = PEERS[peer]
        tokens = run(program, folder, file, json.dumps(PROMPTS), TOKENS)
        logits = np.fromfile(file, np.float32).reshape(len(PROMPTS) * TOKENS, -1)
        assert logits.argmax(-1).tolist() == [token for row in tokens for token in row]
        return cls(tokens, logits)

    def ours(self, folder: Path) -> np.ndarray:
        """The logits that a bundle gives here after the same tokens, one after another."""
        session, tokenizer, rows = Runner(Bundle.open(folder), threads=1), Tokenizer(folder / TOKENIZER), []
        for prompt, tokens in zip(PROMPTS, self.tokens, strict=True):
            ids = tokenizer.encode(prompt)
            cache = session.new_cache(1, len(ids) + TOKENS)
            steps = [ids, *([token] for token in tokens[:-1])]
            rows += [session.forward(cache, slice(0, 1), np.array([given])).copy() for given in steps]
        return np.concatenate(rows)


def differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Root mean square over the vocabulary at each position."""
    return np.sqrt(np.square(one - other, dtype=np.float64).mean(-1))


@pytest.mark.parametrize("precision", [name for name in BUNDLES if name not in UNROUNDED])
def test_same_greedy_tokens(peer: str, precision: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    answer = Answer.ask(peer, bundle_of(precision), tmp_path / "logits")
    ours = gpt2onnx.load(bundle_of(precision), threads=1).generate(PROMPTS, max_new_tokens=TOKENS, do_sample=False)
    for prompt, tokens, result in zip(PROMPTS, answer.tokens, ours, strict=True):
        assert_same_tokens(tokens, result.sequences[0].token_ids, f"{peer}, {precision}, {prompt!r}")
    expected = answer.ours(bundle_of(precision))
    assert_close(answer.logits, expected, 1e-4 * np.abs(expected).max(), f"{peer}, {precision}")


@pytest.mark.parametrize("precision", UNROUNDED)
def test_logits_differ_by_what_kernels_round(peer: str, precision: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    """A peer's kernels may round otherwise, but about as much: so the two differ by at most twice what ours round."""
    folder, exact = bundle_of(precision), UNROUNDED[precision]
    answer = Answer.ask(peer, folder, tmp_path / "logits")
    ours = answer.ours(folder)
    if exact is None:
        compute_in_float32(shutil.copytree(folder, tmp_path / "exact"))
    unrounded = answer.ours(bundle_of(exact) if exact else tmp_path / "exact")
    rounding = differences(ours, unrounded).max()
    assert 0 < rounding < 0.1 * ours.std(), "a bound that says nothing"
    found = differences(answer.logits, ours)
    assert found.max() <= 2 * rounding, (
        f"token {found.argmax()} differs by {found.max():.3g}, rounding is {rounding:.3g}"
    )


@pytest.mark.parametrize("precision", [name for name in BUNDLES if name != "int4"])
def test_past_and_present_may_be_different_arrays(precision: str, bundle_of: BundleOf) -> None:
    """As they are in other runtimes, from an empty past on; ours gives the graph one array for both."""
    folder = bundle_of(precision)
    graph = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    ours = Runner(Bundle.open(folder), threads=1)
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
        wanted = ours.forward(cache, slice(0, 1), tokens[:, start:end], logits="all")[None]
        difference = np.abs(found[contract.LOGITS] - wanted).max()
        assert difference < 1e-4 * np.abs(wanted).max(), f"positions {start} to {end} differ by {difference}"


def test_what_the_peers_are_compared_with_is_right(tales_model: gpt2onnx.Model, tales_reference: Reference) -> None:
    for prompt in PROMPTS:
        ids = tales_model.tokenizer.encode(prompt)
        expected = tales_reference.tokens(ids, do_sample=False, max_new_tokens=TOKENS)
        found = tales_model.generate(prompt, max_new_tokens=TOKENS, do_sample=False).sequences[0].token_ids
        assert_same_tokens(found, expected[0], prompt)
