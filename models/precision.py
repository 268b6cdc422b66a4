"""The precisions: how many bits a weight has, how many share a scale, and what a network takes in each.

Stored sizes follow the layout of exporter.quantize: matrices in blocks along their input, each block with a float16
scale; positions beside them in float16; and everything else (biases, norms) in floats.
"""

import math
from dataclasses import dataclass

from .config import GPT2Config
from .shapes import weight_shapes

DTYPES = ("fp32", "fp16", "int8", "int4")
QUANTIZED = ("int8", "int4")
BLOCK_SIZES = (16, 32, 64, 128, 256)
# 4-bit values need a scale for every few weights; 8 bits lose next to nothing in long blocks.
_BLOCK_SIZE = {8: 128, 4: 32}
_BLOCK_SIZE_PURE = 64  # a fifth faster than 32, which is what `pure` is for
_LAST_LAYERS = 3  # whose c_fc has 8 bits in int4
_FLOAT_BYTES = {"fp32": 4, "fp16": 2, "int8": 4, "int4": 4}
_MATRIX_BITS = {"int8": 8, "int4": 4}
_HALF_BYTES = 2
_EMBEDDINGS = ("wte", "lm_head")


@dataclass(frozen=True)
class Blocks:
    """How a matrix is quantised.

    Attributes:
        bits: of a weight, 8 or 4.
        size: weights along the input that share a scale, one of BLOCK_SIZES.
    """

    bits: int
    size: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a network takes in one precision.

    Attributes:
        weights: all of them, a tied head once.
        cache_per_token: keys and values of one position in all layers.
        cache_full: the same for the whole context window.
    """

    weights: int
    cache_per_token: int
    cache_full: int


def default_block_size(config: GPT2Config, dtype: str, *, pure: bool = False) -> int | None:
    """How many weights share a scale in most matrices where nobody asks for another number; None where none do."""
    bits = _MATRIX_BITS.get(dtype)
    return None if bits is None else _dividing(_BLOCK_SIZE_PURE if pure else _BLOCK_SIZE[bits], config.n_embd)


def blocks(
    config: GPT2Config, dtype: str, name: str, *, pure: bool = False, block_size: int | None = None
) -> Blocks | None:
    """How a matrix is quantised; None where it isn't.

    In int4 some matrices have 8 bits, since 4 would cost most there for what they save: the embedding with the
    output head, the output projection of every attention, and the last three matrices before an activation function.

    Args:
        dtype: one of DTYPES.
        name: the matrix' layer: "wte", "lm_head", "h.0.attn.c_attn" …
        pure: in int4, 4 bits for all of them.
        block_size: one of BLOCK_SIZES; chosen by default.
    """
    bits = _MATRIX_BITS.get(dtype)
    if bits is None:
        return None
    last = [f"h.{layer}.mlp.c_fc" for layer in range(config.n_layer)[-_LAST_LAYERS:]]
    if not pure and (name in _EMBEDDINGS or name.endswith(".attn.c_proj") or name in last):
        bits = 8
    size = _BLOCK_SIZE_PURE if pure else _BLOCK_SIZE[bits]
    return Blocks(bits, block_size or _dividing(size, config.n_embd))


def memory(config: GPT2Config, dtype: str, cache_dtype: str = "fp32") -> Memory:
    """Memory of a network in one of `DTYPES`, its KV cache as the network computes it or in "int8"."""
    shapes = weight_shapes(config, tied=config.tie_word_embeddings)
    weights = sum(_stored(config, name, shape, dtype) for name, shape in shapes.items())
    per_token = 2 * config.n_layer * config.n_embd * (1 if cache_dtype == "int8" else _FLOAT_BYTES[dtype])
    return Memory(weights, per_token, per_token * config.n_positions)


def _stored(config: GPT2Config, name: str, shape: tuple[int, ...], dtype: str) -> int:
    layer = name.removesuffix(".weight")
    if layer == "wpe" and dtype in _MATRIX_BITS:
        return math.prod(shape) * _HALF_BYTES
    stored = None if len(shape) == 1 or layer == "wpe" else blocks(config, dtype, layer)
    if stored is None:
        return math.prod(shape) * _FLOAT_BYTES[dtype]
    rows, width = (shape[0], shape[-1]) if layer in _EMBEDDINGS else (shape[-1], shape[0])
    return rows * -(-width // stored.size) * (stored.size * stored.bits // 8 + _HALF_BYTES)


def _dividing(size: int, width: int) -> int:
    """A block size that divides the width needs no padding; gpt2-xl's 1600 is 25 times 64."""
    while size > min(BLOCK_SIZES) and width % size:
        size //= 2
    return size
