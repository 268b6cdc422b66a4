"""Writes tests/golden/torch_files: small checkpoints as PyTorch saves them, so that reading them is tested without it.

Needs PyTorch: `python tests/golden/make_torch_files.py`.
"""

import json
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import reference_models
from support.reference_models import NETWORKS
from support.weight_files import TINY, save_shards

from gpt2onnx.models.config import GPT2Config
from gpt2onnx.models.shapes import weight_shapes

FOLDER = Path(__file__).parent / "torch_files"


def make(folder: Path) -> None:
    """Writes all files."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    shapes = weight_shapes(GPT2Config.from_dict(TINY), tied=True)
    state = {f"transformer.{name}": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        converted = {key: tensor.to(dtype) for key, tensor in state.items()}
        torch.save(converted, folder / f"{name}.pt")
        torch.save(converted, folder / f"{name}_legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "sharded").mkdir(exist_ok=True)
    save_shards(torch.save, state, folder / "sharded", "pytorch_model", "bin")
    torch.save(
        {"state_dict": {f"model.{key}": tensor for key, tensor in state.items()}, "epoch": 1}, folder / "last.ckpt"
    )
    # Not in the older format, which holds the path and the text of the module's source.
    torch.save(torch.nn.Linear(2, 2), folder / "module.pt")
    for zipped, ending in ((True, ".pt"), (False, "_legacy.pt")):
        content = {"weights": reference_models.views(), "step": 3}
        torch.save(content, folder / f"views{ending}", _use_new_zipfile_serialization=zipped)
        name = f"build_nanogpt{ending}"
        reference_models.save_build_nanogpt(NETWORKS[name](), folder / name, zipped=zipped)
    for name, prefix in (("nanogpt.pt", ""), ("nanogpt_compiled.pt", "_orig_mod.")):
        reference_models.save_nanogpt(NETWORKS[name](), folder / name, prefix)
    reference_models.save_plainly(NETWORKS["book.pth"](), folder / "book.pth")
    with torch.random.fork_rng():  # so that the numbers of what follows stay as they are
        for name in ("book_fast", "book_fast_without_bias", "book_lora", "book_classifier"):
            reference_models.save_plainly(NETWORKS[f"{name}.pth"](), folder / f"{name}.pth")
    name = "book_beside_an_optimizer.pth"
    reference_models.save_beside_an_optimizer(NETWORKS[name](), folder / name)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    make(FOLDER)
    made_with = {"python": platform.python_version(), "machine": platform.machine(), "torch": torch.__version__}
    (FOLDER / "made_with.json").write_text(json.dumps(made_with) + "\n")
