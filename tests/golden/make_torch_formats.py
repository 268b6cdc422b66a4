"""Writes more of tests/golden/other_formats: the network of make_other_formats.py as PyTorch and what builds on it save it.

`python tests/golden/make_torch_formats.py PART [PATH]`.

| part | needs |
|---|---|
| fsdp | torch, transformers |
"""

import json
import os
import sys
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


PARTS = {each.__name__: each for each in (fsdp,)}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*map(Path, sys.argv[2:]))
