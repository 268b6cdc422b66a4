"""The networks of checkpoints that aren't Hugging Face's, written down in PyTorch: what an export has to compute.

And how their programs save them. Needs PyTorch, so tests import it where that is there.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Causal attention over [batch, position, width]."""
    split = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys, values)]
    return functional.scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).flatten(-2)


class _ScaledNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(variance + 1e-5) + self.shift


class _BookAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.W_query, self.W_key, self.W_value = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.triu(torch.ones(context, context), diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(_attend(self.W_query(x), self.W_key(x), self.W_value(x), self.heads))


class _BookFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _BookBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.att, self.ff = _BookAttention(width, context, heads, bias), _BookFeedForward(width)
        self.norm1, self.norm2 = _ScaledNorm(width), _ScaledNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class GPTModel(nn.Module):
    """As in "Build a Large Language Model (From Scratch)", chapter 4: its names, shapes and arithmetic."""

    def __init__(
        self,
        vocabulary: int = 70,
        context: int = 24,
        width: int = 32,
        heads: int = 4,
        layers: int = 2,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.trf_blocks = nn.Sequential(*(_BookBlock(width, context, heads, bias) for _ in range(layers)))
        self.final_norm = _ScaledNorm(width)
        self.out_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


class _FastAttention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_attend(*self.qkv(x).chunk(3, dim=-1), self.heads))


def fast(model: GPTModel) -> GPTModel:
    """The same with one matrix for queries, keys and values, and PyTorch's norms, as in the book's chapters 3 and 5 (bonus)."""
    for block in model.trf_blocks:
        width = block.att.out_proj.in_features
        block.att = _FastAttention(width, block.att.heads, block.att.W_query.bias is not None)
        block.norm1, block.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    model.final_norm = nn.LayerNorm(width)
    return model


class _LoRA(nn.Module):
    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.zeros(inputs, rank)), nn.Parameter(torch.zeros(rank, outputs))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.A @ self.B)


class _LinearWithLoRA(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear, self.lora = linear, _LoRA(linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


def with_lora(model: nn.Module, rank: int, alpha: float) -> nn.Module:
    """The same with each linear layer in one that adds LoRA, as in the book's appendix E."""
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            setattr(model, name, _LinearWithLoRA(module, rank, alpha))
        else:
            with_lora(module, rank, alpha)
    return model


def classifier(model: GPTModel, classes: int) -> GPTModel:
    """The same with a head for classes, as in the book's chapter 6."""
    model.out_head = nn.Linear(model.out_head.in_features, classes)
    return model


class _NanoAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
        # Only there where PyTorch has no flash attention; a name that GPT-2 uses for the mask, not for a bias.
        self.register_buffer("bias", torch.tril(torch.ones(context, context))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(_attend(*self.c_attn(x).chunk(3, dim=-1), self.heads))


class _NanoFeedForward(nn.Module):
    def __init__(self, width: int, bias: bool, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.gelu(self.c_fc(x), approximate=self.approximate))


class _NanoBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int, bias: bool, approximate: str) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attn = _NanoAttention(width, context, heads, bias)
        self.mlp = _NanoFeedForward(width, bias, approximate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """As nanoGPT's model.py names and computes it; with `approximate="tanh"` and biases as build-nanogpt does."""

    def __init__(
        self,
        vocabulary: int = 70,
        context: int = 24,
        width: int = 32,
        heads: int = 4,
        layers: int = 2,
        bias: bool = False,
        approximate: str = "none",
    ) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(context, width),
                "h": nn.ModuleList(_NanoBlock(width, context, heads, bias, approximate) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight
        self.arguments = {
            "vocab_size": vocabulary, "block_size": context, "n_embd": width,
            "n_head": heads, "n_layer": layers, "bias": bias, "dropout": 0.0,
        }  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class GPTConfig:
    """build-nanogpt's settings: saved as an object of a class of the script that trains."""

    __module__ = "__main__"

    def __init__(self, model: NanoGPT) -> None:
        self.__dict__ |= {"n_head": model.arguments["n_head"], "block_size": model.arguments["block_size"]}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters differ from those of a new network, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def far_from_zero(model: NanoGPT) -> NanoGPT:
    """Far enough from 0 to tell the two GELUs apart."""
    with torch.no_grad():
        model.transformer["h"][0].mlp.c_fc.weight *= 5
    return model


def _after_one_step(model: nn.Module) -> dict[str, Any]:
    """The state of an optimizer that has moments of every parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def save_plainly(model: nn.Module, path: Path) -> None:
    """The state dict alone."""
    torch.save(model.state_dict(), path)


def save_beside_an_optimizer(model: nn.Module, path: Path) -> None:
    """As the book's chapter 5 does."""
    optimizer = _after_one_step(model)
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer}, path)


def save_nanogpt(model: NanoGPT, path: Path, prefix: str = "") -> None:
    """As nanoGPT's train.py does; torch.compile makes the prefix `_orig_mod.`."""
    optimizer = _after_one_step(model)
    saved = {
        "model": {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()},
        "optimizer": optimizer,
        "model_args": model.arguments,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "n_head": model.arguments["n_head"], "decay_lr": True},
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
    }
    torch.save(saved, path)


def save_build_nanogpt(model: NanoGPT, path: Path, *, zipped: bool) -> None:
    """As build-nanogpt's train_gpt2.py does."""
    saved = {"model": model.state_dict(), "config": GPTConfig(model), "step": 3, "val_loss": 3.5}
    main = sys.modules["__main__"]
    main.GPTConfig = GPTConfig  # pickle looks it up there
    try:
        torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    finally:
        del main.GPTConfig


def views() -> OrderedDict[str, Tensor]:
    """Tensors of many shapes and types, most of which share a storage."""
    base = torch.arange(600, dtype=torch.float32).reshape(20, 30)
    return OrderedDict(
        whole=base,
        transposed=base.T,
        window=base[3:17:2, 5:25:3],
        row=base[7],
        repeated=base[0].expand(4, 30),
        number=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
        parameter=nn.Parameter(base[1:3] * 2),
        half=(base / 7).half()[:, 4:],
        brain=(base / 7).bfloat16().T,
        whole_numbers=torch.arange(9).reshape(3, 3)[1:],
    )


_SMALL = {"vocabulary": 29, "context": 8, "width": 8, "heads": 2, "layers": 1}
# The networks of files in tests/golden/torch_files.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "nanogpt.pt": lambda: randomised(NanoGPT(**_SMALL)),
    "nanogpt_compiled.pt": lambda: randomised(NanoGPT(**_SMALL, bias=True)),
    "build_nanogpt.pt": lambda: far_from_zero(randomised(NanoGPT(**_SMALL, bias=True, approximate="tanh"))),
    "build_nanogpt_legacy.pt": lambda: far_from_zero(randomised(NanoGPT(**_SMALL, bias=True, approximate="tanh"))),
    "book.pth": lambda: randomised(GPTModel(**_SMALL)),
    "book_beside_an_optimizer.pth": lambda: randomised(GPTModel(**_SMALL, bias=True)),
    "book_fast.pth": lambda: randomised(fast(GPTModel(**_SMALL, bias=True))),
    "book_fast_without_bias.pth": lambda: randomised(fast(GPTModel(**_SMALL))),
    "book_lora.pth": lambda: randomised(with_lora(GPTModel(**_SMALL), rank=3, alpha=6)),
    "book_classifier.pth": lambda: randomised(classifier(GPTModel(**_SMALL), 2)),
}


def load(path: Path) -> Any:
    """What PyTorch reads from a file."""
    with torch.serialization.safe_globals([(GPTConfig, "__main__.GPTConfig")]):
        return torch.load(path, weights_only=True)


def saved_network(path: Path) -> nn.Module:
    """The network of a file in tests/golden/torch_files, with the weights that PyTorch reads from it."""
    content = load(path)
    state = next((content[name] for name in ("model", "model_state_dict") if name in content), content)
    model = NETWORKS[path.name]()
    model.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()})
    return model
