"""The networks of checkpoints that aren't Hugging Face's, written down in PyTorch: what an export has to compute."""

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
