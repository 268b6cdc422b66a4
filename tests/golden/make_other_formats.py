"""Writes tests/golden/other_formats: one small network as other programs save it, with the logits that each of them computes.

Each program wants an environment of its own, in which its part is run: `python tests/golden/make_other_formats.py PART [PATH]`.

| part | needs |
|---|---|
| llm_c | torch, a clone of karpathy/llm.c at PATH |
| mingpt_2020, mingpt_2022 | torch, a clone of karpathy/minGPT at PATH |
| mlx | mlx, mlx-lm |
| onnx | optimum-onnx, transformers 4.57 |
| h5 | transformers 4.57, tensorflow, tf-keras |
| flax | transformers 4.57, flax |
| keras | keras-hub, with KERAS_BACKEND=jax |
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "other_formats"
VOCABULARY, POSITIONS, WIDTH, LAYERS, HEADS = 61, 24, 16, 2, 2
TOKENS = [3, 60, 0, 17, 17, 42]
Array = Any


def network(width: int = WIDTH) -> dict[str, np.ndarray]:
    """Weights by their names in GPT2LMHeadModel, matrices [in, out]."""
    draw = np.random.default_rng(0)
    matrices = {
        "attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width), "mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, width), "wpe.weight": (POSITIONS, width)}
    for layer in range(LAYERS):
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (width,), f"h.{layer}.{name}.bias": (width,)}
        for name, (inputs, outputs) in matrices.items():
            shapes |= {f"h.{layer}.{name}.weight": (inputs, outputs), f"h.{layer}.{name}.bias": (outputs,)}
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return {name: 0.5 * draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def linear(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same, matrices of blocks [out, in]."""
    return {
        name: array.T.copy() if name.startswith("h.") and array.ndim == 2 else array for name, array in state.items()
    }


def record(part: str, logits: Array, made_with: Mapping[str, str]) -> None:
    """Writes the logits of TOKENS, [positions, vocabulary], and the versions."""
    np.save(FOLDER / part / "logits.npy", np.asarray(logits, np.float32)[:, :VOCABULARY])
    path = FOLDER / "made_with.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(dict(sorted({**told, part: dict(made_with)}.items())), indent=1) + "\n")


def module(source: str, name: str) -> ModuleType:
    """A module of a program that no package installs."""
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    exec(compile(source, name, "exec"), made.__dict__)
    return made


def shown_at(clone: Path, commit: str, path: str) -> str:
    return subprocess.run(
        ["git", "-C", clone, "show", f"{commit}:{path}"], capture_output=True, text=True, check=True
    ).stdout


def commit_of(clone: Path, *options: str) -> str:
    command = ["git", "-C", clone, "log", "-1", "--format=%h", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def filled(model: Any, state: Mapping[str, np.ndarray]) -> Any:
    """A network of PyTorch with these weights; its masks and its tied head stay."""
    import torch

    own = model.state_dict()
    rest = {name for name in own if name not in state and not name.endswith(("attn.bias", "mask", "lm_head.weight"))}
    assert not rest, rest
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=False)
    return model.eval()


def llm_c(clone: Path) -> None:
    import torch

    commit = commit_of(clone)
    program = module(shown_at(clone, commit, "train_gpt2.py"), "train_gpt2")
    # The original pads a vocabulary of 50,257 only.
    program.pad_vocab = lambda tensor: torch.nn.functional.pad(tensor, (0, 0, 0, 128 - VOCABULARY))
    config = program.GPTConfig(block_size=POSITIONS, vocab_size=VOCABULARY, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH)
    model = filled(program.GPT(config), {f"transformer.{name}": array for name, array in linear(network()).items()})
    for part, dtype in (("llm_c_bf16", torch.bfloat16), ("llm_c", torch.float32)):
        (FOLDER / part).mkdir(parents=True, exist_ok=True)
        program.write_model(model, FOLDER / part / "gpt2.bin", str(dtype).removeprefix("torch."))
        with torch.no_grad():
            rounded = filled(
                program.GPT(config), {name: each.to(dtype).float().numpy() for name, each in model.state_dict().items()}
            )
            logits, _ = rounded(torch.tensor([TOKENS]), torch.tensor([TOKENS]))
        record(part, logits[0], {"llm.c": commit, "torch": torch.__version__})


def mingpt_2020(clone: Path) -> None:

    commit = commit_of(clone, "--until=2021-12-31")
    program = module(shown_at(clone, commit, "mingpt/model.py"), "mingpt_2020")
    config = program.GPTConfig(VOCABULARY, POSITIONS, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH)
    ours = linear(network())
    state = {
        "tok_emb.weight": ours["wte.weight"],
        "pos_emb": ours["wpe.weight"][None],
        "head.weight": ours["wte.weight"] + 0.1,
    }
    state |= {f"ln_f.{kind}": ours[f"ln_f.{kind}"] for kind in ("weight", "bias")}
    for layer in range(LAYERS):
        for kind in ("weight", "bias"):
            parts = np.split(ours[f"h.{layer}.attn.c_attn.{kind}"], 3)
            state |= {
                f"blocks.{layer}.attn.{name}.{kind}": part
                for name, part in zip(("query", "key", "value"), parts, strict=True)
            }
            for theirs, name in (
                ("attn.proj", "attn.c_proj"),
                ("mlp.0", "mlp.c_fc"),
                ("mlp.2", "mlp.c_proj"),
                ("ln1", "ln_1"),
                ("ln2", "ln_2"),
            ):
                state[f"blocks.{layer}.{theirs}.{kind}"] = ours[f"h.{layer}.{name}.{kind}"]
    save_mingpt("mingpt_2020", commit, filled(program.GPT(config), state))


def mingpt_2022(clone: Path) -> None:
    commit = commit_of(clone)
    utils = module(shown_at(clone, commit, "mingpt/utils.py"), "mingpt.utils")
    sys.modules["mingpt"] = utils
    program = module(shown_at(clone, commit, "mingpt/model.py"), "mingpt_2022")
    config = program.GPT.get_default_config()
    config.model_type, config.vocab_size, config.block_size = None, VOCABULARY, POSITIONS
    config.n_layer, config.n_head, config.n_embd = LAYERS, HEADS, WIDTH
    ours = linear(network())
    state = {f"transformer.{name}": array for name, array in ours.items()} | {
        "lm_head.weight": ours["wte.weight"] + 0.1
    }
    save_mingpt("mingpt_2022", commit, filled(program.GPT(config), state))


def save_mingpt(part: str, commit: str, model: Any) -> None:
    import torch

    (FOLDER / part).mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), FOLDER / part / "model.pt")  # as its Trainer and projects do
    with torch.no_grad():
        logits, _ = model(torch.tensor([TOKENS]))
    record(part, logits[0], {"minGPT": commit, "torch": torch.__version__})


def config() -> dict[str, Any]:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_ctx": POSITIONS,
        "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip


def mlx() -> None:
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm.models.gpt2 import Model, ModelArgs

    for part, bits, width in (("mlx", None, WIDTH), ("mlx_4bit", 4, 32), ("mlx_8bit", 8, 32), ("mlx_3bit", 3, 32)):
        settings = config() | {"n_embd": width, "layer_norm_epsilon": 1e-5}
        model = Model(ModelArgs.from_dict(settings))
        own = {name: mx.array(array) for name, array in network(width).items()}
        model.load_weights(list(model.sanitize(own).items()))
        if bits:
            settings["quantization"] = {"group_size": 32, "bits": bits, "mode": "affine"}
            nn.quantize(model, 32, bits)
        folder = FOLDER / part
        folder.mkdir(parents=True, exist_ok=True)
        weights = dict(tree_flatten(model.parameters()))
        # As mlx_lm.utils.save_model and save_config do.
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(settings, indent=4))
        record(part, model(mx.array([TOKENS]))[0], {"mlx": version("mlx"), "mlx-lm": version("mlx-lm")})


def transformers_network(folder: Path, **settings: Any) -> Any:
    """GPT2LMHeadModel with the weights, saved as it saves itself."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**config() | settings))
    state = {f"transformer.{name}": array for name, array in network().items()}
    if settings:
        state["lm_head.weight"] = state["transformer.wte.weight"] + 0.1
    filled(model, state).save_pretrained(folder)
    return model


def onnx() -> None:
    import onnxruntime
    from optimum.exporters.onnx import main_export

    versions = {name: version(name) for name in ("optimum-onnx", "transformers", "torch")}
    for part, untied in (("onnx", False), ("onnx_untied", True)):
        with tempfile.TemporaryDirectory() as folder:
            transformers_network(Path(folder), **({"tie_word_embeddings": False} if untied else {}))
            main_export(folder, FOLDER / part, task="text-generation", do_validation=False)
        session = onnxruntime.InferenceSession(FOLDER / part / "model.onnx")
        ids = np.array([TOKENS])
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(TOKENS))[None]}
        record(
            part,
            session.run(["logits"], {each.name: given[each.name] for each in session.get_inputs()})[0][0],
            versions,
        )


def h5() -> None:
    from transformers import TFGPT2LMHeadModel

    (FOLDER / "h5").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        transformers_network(Path(folder))
        model = TFGPT2LMHeadModel.from_pretrained(folder, from_pt=True)
    model.save_pretrained(FOLDER / "h5")
    record(
        "h5",
        model(np.array([TOKENS])).logits[0],
        {name: version(name) for name in ("transformers", "tensorflow-cpu", "tf-keras", "h5py")},
    )


def flax() -> None:
    from transformers import FlaxGPT2LMHeadModel

    (FOLDER / "flax").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        transformers_network(Path(folder))
        model = FlaxGPT2LMHeadModel.from_pretrained(folder, from_pt=True)
    model.save_pretrained(FOLDER / "flax")
    record(
        "flax", model(np.array([TOKENS])).logits[0], {name: version(name) for name in ("transformers", "flax", "jax")}
    )


def keras() -> None:
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY, num_layers=LAYERS, num_heads=HEADS, hidden_dim=WIDTH, intermediate_dim=4 * WIDTH, max_sequence_length=POSITIONS
    )  # fmt: skip
    model = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    inside = {
        "self_attention/attention_output": "attn.c_proj", "feedforward_intermediate_dense": "mlp.c_fc",
        "feedforward_output_dense": "mlp.c_proj", "self_attention_layer_norm": "ln_1", "feedforward_layer_norm": "ln_2",
    }  # fmt: skip
    kinds = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}
    outside = {
        "token_embedding/embeddings": "wte.weight",
        "position_embedding/embeddings": "wpe.weight",
        "layer_norm/gamma": "ln_f.weight",
        "layer_norm/beta": "ln_f.bias",
    }
    state = network()
    for each in model.weights:
        if each.path in outside:
            array = state[outside[each.path]]
        else:
            block, _, rest = each.path.removeprefix("transformer_layer_").partition("/")
            place, kind = rest.rsplit("/", 1)
            if place in inside:
                array = state[f"h.{block}.{inside[place]}.{kinds[kind]}"]
            else:
                joined = state[f"h.{block}.attn.c_attn.{kinds[kind]}"]
                array = np.split(joined, 3, axis=-1)[("query", "key", "value").index(place.split("/")[1])]
        each.assign(array.reshape(each.shape))
    (FOLDER / "keras").mkdir(parents=True, exist_ok=True)
    model.save_weights(FOLDER / "keras" / "model.weights.h5")
    backbone.save_to_preset(FOLDER / "keras_preset")
    ids = np.array([TOKENS])
    logits = model({"token_ids": ids, "padding_mask": np.ones_like(ids)})[0]
    record("keras", logits, {name: version(name) for name in ("keras", "keras-hub", "h5py")})
    record("keras_preset", logits, {name: version(name) for name in ("keras", "keras-hub", "h5py")})


PARTS = {each.__name__: each for each in (llm_c, mingpt_2020, mingpt_2022, mlx, onnx, h5, flax, keras)}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*map(Path, sys.argv[2:]))
