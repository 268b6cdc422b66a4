"""Writes more of tests/golden/other_formats: the network of make_other_formats.py as PyTorch and what builds on it save it.

`python tests/golden/make_torch_formats.py PART [PATH]`.

| part | needs |
|---|---|
| fsdp | torch, transformers |
| rust | torch, transformers, a C++ compiler, ninja |
| torchscript | torch, transformers |
"""

import json
import os
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from make_other_formats import (
    FOLDER,
    HEADS,
    LAYERS,
    POSITIONS,
    TOKENS,
    VOCABULARY,
    WIDTH,
    config,
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


PARTS = {each.__name__: each for each in (fsdp, rust, torchscript)}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*map(Path, sys.argv[2:]))
