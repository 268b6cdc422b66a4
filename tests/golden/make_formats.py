"""Writes tests/golden/formats: small checkpoints as TensorFlow and llama.cpp's package save them, and their numbers.

Needs both: `pip install tensorflow-cpu gguf`, then `python tests/golden/make_formats.py`.
"""

import contextlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import tensorflow

FOLDER = Path(__file__).parent / "formats"
WIDTH, POSITIONS, LAYERS, HEADS = 32, 8, 1, 4
MATRICES = {
    "attn/c_attn": (WIDTH, 3 * WIDTH), "attn/c_proj": (WIDTH, WIDTH), "mlp/c_fc": (WIDTH, 4 * WIDTH), "mlp/c_proj": (4 * WIDTH, WIDTH)
}  # fmt: skip
# As llama.cpp's converter names them.
LLAMA_CPP = {
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn/c_attn": "attn_qkv", "attn/c_proj": "attn_output", "mlp/c_fc": "ffn_up",
    "mlp/c_proj": "ffn_down",
}  # fmt: skip
KINDS = {"g": "weight", "w": "weight", "b": "bias"}


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges: GPT-2's letters for bytes, three merges, and the end of a text."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    return [*letters, *("".join(pair) for pair in merges), "<|endoftext|>"], [" ".join(pair) for pair in merges]


def numbers(count: int) -> dict[str, np.ndarray]:
    """The weights by OpenAI's names."""
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"wte": (count, WIDTH), "wpe": (POSITIONS, WIDTH)}
    for layer in range(LAYERS):
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h{layer}/{name}/g": (WIDTH,), f"h{layer}/{name}/b": (WIDTH,)}
        for name, (inputs, outputs) in MATRICES.items():
            shapes |= {f"h{layer}/{name}/w": (1, inputs, outputs), f"h{layer}/{name}/b": (outputs,)}
    shapes |= {"ln_f/g": (WIDTH,), "ln_f/b": (WIDTH,)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def save_tensorflow(weights: dict[str, np.ndarray], folder: Path) -> None:
    """Two checkpoints of one training, each beside an optimizer's variables, as gpt-2-simple leaves them."""
    tf = tensorflow.compat.v1
    tf.disable_eager_execution()
    with tf.variable_scope("model"):
        variables = {name: tf.get_variable(name, initializer=array) for name, array in weights.items()}
    update = tf.train.AdamOptimizer(0.0).minimize(tf.add_n([tf.reduce_sum(each) for each in variables.values()]))
    saver = tf.train.Saver(max_to_keep=2)
    # From inside, so that the files don't name a folder of this machine.
    with contextlib.chdir(folder), tf.Session() as session:
        session.run(tf.global_variables_initializer())
        saver.save(session, "model", global_step=1, write_meta_graph=False)
        session.run(update)
        session.run(variables["wpe"].assign(weights["wpe"] + 1))
        saver.save(session, "model", global_step=2, write_meta_graph=False)
    hparams = {"n_vocab": len(weights["wte"]), "n_ctx": POSITIONS, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS}
    (folder / "hparams.json").write_text(json.dumps(hparams))


def save_gguf(weights: dict[str, np.ndarray], path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """As llama.cpp's converter writes it: matrices [out, in], rounded; the rest in float32."""
    tokens, merges = vocabulary()
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    for name, array in weights.items():
        block, _, rest = name.partition("/")
        outside = {
            "wte": "token_embd.weight",
            "wpe": "position_embd.weight",
            "ln_f/g": "output_norm.weight",
            "ln_f/b": "output_norm.bias",
        }
        if name in outside:
            theirs = outside[name]
        else:
            layer, end = rest.rsplit("/", 1)
            theirs = f"blk.{block[1:]}.{LLAMA_CPP[layer]}.{KINDS[end]}"
        stored = array[0].T if array.ndim == 3 else array
        rounded = kind if stored.ndim == 2 and name != "wpe" else gguf.GGMLQuantizationType.F32
        writer.add_tensor(theirs, gguf.quantize(np.ascontiguousarray(stored), rounded), raw_dtype=rounded)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    (FOLDER / "tensorflow").mkdir(parents=True, exist_ok=True)
    made = numbers(len(vocabulary()[0]))
    np.savez(FOLDER / "numbers.npz", **made)
    save_tensorflow(made, FOLDER / "tensorflow")
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0"):
        save_gguf(made, FOLDER / f"{name}.gguf", gguf.GGMLQuantizationType[name])
    versions = {"tensorflow": tensorflow.__version__, "gguf": version("gguf"), "python": platform.python_version()}
    (FOLDER / "made_with.json").write_text(json.dumps(versions) + "\n")
