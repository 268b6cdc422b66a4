"""Writes more of tests/golden/other_formats: the network of make_other_formats.py as PyTorch and what builds on it save it.

`python tests/golden/make_torch_formats.py PART [PATH]`.

| part | needs |
|---|---|
| fsdp | torch, transformers |
| rust | torch, transformers, a C++ compiler, ninja |
| torchscript | torch, transformers |
| megatron | torch, transformers, an unpacked wheel of transformers 4.46.3 at PATH, which has the converter |
| gptq | torch, transformers, an unpacked wheel of auto-gptq 0.7.1 at PATH |
"""

import argparse
import enum
import importlib
import json
import os
import sys
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from make_other_formats import (
    FOLDER,
    HEADS,
    LAYERS,
    POSITIONS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    config,
    linear,
    module,
    network,
    record,
)


def fsdp() -> None:
    """Two processes share the network, as accelerate has them save it, beside an optimizer's states."""
    import torch
    import transformers

    torch.multiprocessing.spawn(_fsdp, nprocs=2)  # type: ignore[no-untyped-call]
    for part in ("fsdp", "fsdp_whole"):
        (FOLDER / part / "config.json").write_text(json.dumps(config()))
        with torch.no_grad():
            logits = _gpt2()(torch.tensor([TOKENS])).logits[0]
        record(part, logits, {"torch": torch.__version__, "transformers": transformers.__version__})


def _gpt2(width: int = WIDTH) -> Any:
    """The network in transformers."""
    import torch
    import transformers

    sizes = {"n_embd": width, "vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_layer": LAYERS, "n_head": HEADS}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    state = {f"transformer.{name}": torch.from_numpy(array) for name, array in network(width).items()}
    model.load_state_dict(state, strict=False)
    return model


def _fsdp(rank: int) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", "tcp://127.0.0.1:29517", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = _gpt2()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    weights, states = get_state_dict(model, optimizer)
    os.chdir(FOLDER)  # the files keep their folder's name
    dcp.save({"model": weights}, checkpoint_id=Path("fsdp/pytorch_model_fsdp_0"))
    dcp.save({"model": weights, "optim": states, "step": 3}, checkpoint_id=Path("fsdp_whole"))
    torch.distributed.destroy_process_group()


# As tch's VarStore::save and rust-bert's convert-tensor write their files: at_save_multi of
# https://github.com/LaurentMazare/tch-rs/blob/main/torch-sys/libtch/torch_api.cpp
LIBTORCH = """
#include <torch/extension.h>
void save(std::vector<std::string> names, std::vector<torch::Tensor> tensors, std::string path) {
  torch::serialize::OutputArchive archive;
  for (size_t i = 0; i < names.size(); ++i) archive.write(names[i], tensors[i]);
  archive.save_to(path);
}
"""


def rust() -> None:
    """LibTorch's archive, with the names of rust-bert: those of the state dict, with a bar for each dot."""
    import torch
    import transformers
    from torch.utils.cpp_extension import load_inline

    libtorch = load_inline("libtorch_archive", LIBTORCH, functions=["save"])
    model = _gpt2()
    state = {name.replace(".", "|"): tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (FOLDER / "rust").mkdir(exist_ok=True)
    os.chdir(FOLDER / "rust")  # the file keeps its path's last part, but no more
    libtorch.save(list(state), list(state.values()), "rust_model.ot")
    Path("config.json").write_text(json.dumps(config()))
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    record("rust", logits, {"torch": torch.__version__, "transformers": transformers.__version__})


def torchscript() -> None:
    """The network as transformers' guide to TorchScript traces it."""
    import torch
    import transformers

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _gpt2()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        traced = torch.jit.trace(Logits(), ids)
        (FOLDER / "torchscript").mkdir(exist_ok=True)
        whole = BytesIO()
        torch.jit.save(traced, whole)
        _without_places(whole, FOLDER / "torchscript" / "model.pt")
        (FOLDER / "torchscript" / "config.json").write_text(json.dumps(config()))
        record("torchscript", traced(ids)[0], {"torch": torch.__version__, "transformers": transformers.__version__})


def _without_places(archive: BytesIO, path: Path) -> None:
    """Writes an archive without its records for debuggers, which tell where the program's files lay."""
    import torch

    archive.seek(0)
    reader, writer = torch._C.PyTorchFileReader(archive), torch._C.PyTorchFileWriter(str(path))
    for name in reader.get_all_records():
        if not name.endswith(".debug_pkl") and name not in ("version", "byteorder", ".data/serialization_id"):
            content = reader.get_record(name)
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()


def gptq(package: Path) -> None:
    """AutoGPTQ quantises each matrix, packs it, and gives it back: the reference computes with these."""
    import torch
    from safetensors.torch import save_file

    for name in ("auto_gptq", "auto_gptq.quantization", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        sys.modules[name] = ModuleType(name)  # its own __init__ asks for a transformers of its time
        sys.modules[name].__path__ = [str(package / name.replace(".", "/"))]
    program = importlib.import_module("auto_gptq.quantization.gptq")
    layer_class = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
    torch.cuda.synchronize = lambda *_: None  # called on CPUs, too
    width = 32
    for part, bits, group, shuffled, symmetric in (
        ("gptq", 4, 16, True, False), ("gptq_2bit", 2, 16, False, True), ("gptq_3bit", 3, -1, False, False), ("gptq_8bit", 8, 16, True, True)
    ):  # fmt: skip
        model, state = _gpt2(width).half(), dict[str, torch.Tensor]()
        for name, conv in list(model.named_modules()):
            if type(conv).__name__ != "Conv1D":
                continue
            quantiser = program.GPTQ(conv)
            quantiser.quantizer.configure(bits, perchannel=True, sym=symmetric)
            quantiser.add_batch(torch.randn(1, 99, conv.nx, generator=torch.Generator().manual_seed(0)), None)
            scales, zeros, groups = quantiser.fasterquant(group_size=group, actorder=shuffled)
            layer = layer_class(bits, group, conv.nx, conv.nf, bias=True)
            layer.pack(conv, scales, zeros, groups)
            kinds = ("qweight", "qzeros", "scales", "g_idx", "bias")
            state |= {f"{name}.{kind}": getattr(layer, kind).contiguous() for kind in kinds}
            layer.bias = None
            conv.weight.data = layer(torch.eye(conv.nx, dtype=torch.float16))
        for name, tensor in model.state_dict().items():
            if name != "lm_head.weight" and f"{name.removesuffix('.weight')}.qweight" not in state:
                state[name] = tensor
        (FOLDER / part).mkdir(exist_ok=True)
        save_file(state, FOLDER / part / f"gptq_model-{bits}bit-{group}g.safetensors", {"format": "pt"})
        settings = {"bits": bits, "group_size": group, "desc_act": shuffled, "sym": symmetric, "quant_method": "gptq"}
        (FOLDER / part / "quantize_config.json").write_text(json.dumps(settings))
        told = config() | {"n_embd": width, "quantization_config": settings}
        (FOLDER / part / "config.json").write_text(json.dumps(told))
        with torch.no_grad():
            logits = model.float()(torch.tensor([TOKENS])).logits[0]
        np.save(FOLDER / part / "c_attn.npy", model.transformer.h[1].attn.c_attn.weight.detach().half())
        record(part, logits, {"auto-gptq": "0.7.1", "torch": torch.__version__})


def megatron(package: Path) -> None:
    """Laid out as Megatron-LM's checkpointing.py and mpu/layers.py do; transformers' converter reads the same network, whole."""
    import torch
    import transformers

    place = package / "transformers/models/megatron_gpt2/convert_megatron_gpt2_checkpoint.py"
    converter = module(place.read_text(), "converter")
    enums = ModuleType("megatron.core.enums")
    enums.ModelType = enum.Enum("ModelType", {"encoder_or_decoder": 1}, module=enums.__name__)  # type: ignore[attr-defined, misc]
    sys.modules |= {
        "megatron": ModuleType("megatron"),
        "megatron.core": ModuleType("megatron.core"),
        enums.__name__: enums,
    }
    arguments = argparse.Namespace(
        padded_vocab_size=64, max_position_embeddings=POSITIONS, hidden_size=WIDTH, num_layers=LAYERS, num_attention_heads=HEADS,
        ffn_hidden_size=4 * WIDTH, bias_gelu_fusion=False, openai_gelu=False, tensor_model_parallel_size=2, layernorm_epsilon=1e-5,
        params_dtype=torch.float32, model_type=enums.ModelType.encoder_or_decoder, make_vocab_size_divisible_by=16,
    )  # fmt: skip
    for part, version, parts, step in (("megatron", 3.0, 2, "iter_0000100"), ("megatron_0", 0, 2, "release"), ("megatron_1", 1.0, 1, "release")):  # fmt: skip
        beside = {"iteration": 100, "rng_state": [{"np_rng_state": np.random.RandomState(0).get_state(), "torch_rng_state": torch.get_rng_state()}]}  # fmt: skip
        beside |= {"args": arguments} if version == 3 else {}
        beside |= {"checkpoint_version": version} if version else {}
        settings = transformers.GPT2Config(**config() | {"activation_function": "gelu" if version == 3 else "gelu_new"})
        whole = beside | {"model": _megatron_part(version, 0, 1)}
        converted = converter.convert_megatron_checkpoint(None, whole, settings)
        for rank in range(parts):
            file = FOLDER / part / step / f"mp_rank_{rank:02}" / "model_optim_rng.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(beside | {"model": _megatron_part(version, rank, parts), "optimizer": {"state": {}}}, file)
        latest = step.removeprefix("iter_").lstrip("0")
        (FOLDER / part / "latest_checkpointed_iteration.txt").write_text(latest)
        told = {"vocab_size": VOCABULARY} | ({} if version == 3 else {"n_head": HEADS})
        (FOLDER / part / "config.json").write_text(json.dumps(told))
        model = transformers.GPT2LMHeadModel(settings).eval()
        model.load_state_dict(converted, strict=False)
        with torch.no_grad():
            record(
                part,
                model(torch.tensor([TOKENS])).logits[0],
                {"transformers' converter": "4.46.3", "torch": torch.__version__},
            )


def _megatron_part(version: float, rank: int, parts: int) -> dict[str, Any]:
    """The network on one device of several, with the names of its time."""
    import torch

    ours, attention = linear(network()), "self_attention" if version else "attention"
    words = np.concatenate([ours["wte.weight"], np.full((3, WIDTH), 9, np.float32)])
    places = {
        "ln_1": "input_layernorm", "attn.c_attn": f"{attention}.query_key_value", "attn.c_proj": f"{attention}.dense",
        "ln_2": "post_attention_layernorm", "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h",
    }  # fmt: skip
    blocks = {}
    for name, array in ours.items():
        if name.startswith("h."):
            _, layer, place = name.split(".", 2)
            place, kind = place.rsplit(".", 1)
            if place == "attn.c_attn":  # [3, heads, size]; a device has some of the heads
                rest = array.shape[1:]
                mine = np.split(array.reshape(3, HEADS, -1, *rest), parts, axis=1)[rank]
                order = {0: (0, 1, 2), 1: (1, 2, 0)}.get(int(version), (1, 0, 2))
                array = mine.transpose(*order, *range(3, mine.ndim)).reshape(-1, *rest)
            elif place == "mlp.c_fc":
                array = np.split(array, parts)[rank]
            elif kind == "weight" and place in ("attn.c_proj", "mlp.c_proj"):
                array = np.split(array, parts, axis=1)[rank]
            blocks[f"layers.{layer}.{places[place]}.{kind}"] = torch.from_numpy(array.copy())
        elif name.startswith("ln_f."):
            blocks[name.replace("ln_f.", "final_layernorm.")] = torch.from_numpy(array)
    embedding = {
        "word_embeddings": {"weight": torch.from_numpy(np.split(words, parts)[rank].copy())},
        "position_embeddings": {"weight": torch.from_numpy(ours["wpe.weight"])},
    }
    return {"language_model": {"embedding": embedding, "encoder" if version else "transformer": blocks}}


PARTS = {each.__name__: each for each in (fsdp, rust, torchscript, gptq, megatron)}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*map(Path, sys.argv[2:]))
