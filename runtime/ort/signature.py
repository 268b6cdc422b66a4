"""Whether a graph is the network that config.json describes, by the inputs and outputs that it declares.

Knows no runtime: it is given names, types and shapes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gpt2onnx.errors import BundleError

from ...models import contract
from ...models.bundle import Bundle
from ...models.messages import shown

# A type in ONNX's words, and the length of each axis, or a name where that varies.
Declared = tuple[str, Sequence[int | str | None]]
_Wanted = tuple[str | None, tuple[int | None, ...]]

_IDS: _Wanted = ("tensor(int64)", (None, None))


def check(
    bundle: Bundle,
    floats: npt.DTypeLike,
    inputs: Mapping[str, Declared],
    outputs: Mapping[str, Declared],
    graph: object,
    *,
    ragged: bool,
) -> None:
    """Compares a graph with its bundle's architecture.

    Args:
        bundle: the graph's.
        floats: of activations, and of a cache that isn't int8.
        inputs: of the graph, by name.
        outputs: of the graph, by name.
        graph: what errors name.
        ragged: whether it is one of the runtime's own, whose rows bring their own numbers of tokens.

    Raises:
        BundleError: an input or output is missing, unknown, or of another type or shape.
    """
    config = bundle.config
    cached = _type(np.int8 if bundle.cache_dtype == "int8" else floats), (None, config.n_head, None, config.head_size)
    layers = range(config.n_layer)
    wanted: dict[str, _Wanted] = {contract.INPUT_IDS: _IDS}
    if ragged:
        wanted |= dict.fromkeys(
            (contract.PAST_LENGTHS, contract.COUNTS, contract.LOGITS_AT), ("tensor(int64)", (None,))
        )
    else:
        wanted |= dict.fromkeys((contract.ATTENTION_MASK, contract.POSITION_IDS), _IDS)
    wanted |= {name: cached for layer in layers for name in contract.past_names(layer)}
    if contract.LOGITS_TO_KEEP in inputs:
        wanted[contract.LOGITS_TO_KEEP] = "tensor(int64)", (1,)
    _compare("input", inputs, wanted, graph)
    wanted = {contract.LOGITS: (None, (None, None, config.vocab_size))}
    wanted |= {name: cached for layer in layers for name in contract.present_names(layer)}
    if ragged and contract.HIDDEN in outputs:
        wanted[contract.HIDDEN] = _type(floats), (None, 1, config.n_embd)
    _compare("output", outputs, wanted, graph)


def _type(numbers: npt.DTypeLike) -> str:
    """A tensor's type in ONNX's words."""
    dtype = np.dtype(numbers)
    return f"tensor({'float' if dtype == np.float32 else dtype.name})"


def _compare(kind: str, declared: Mapping[str, Declared], wanted: Mapping[str, _Wanted], graph: object) -> None:
    for name in sorted(declared.keys() ^ wanted.keys()):
        reason = "lacks" if name in wanted else "shouldn't have"
        raise BundleError(f"{graph} isn't what config.json describes: it {reason} the {kind} {shown(name)}")
    for name, (number, shape) in wanted.items():
        its_number, its_shape = declared[name]
        fits = len(its_shape) == len(shape) and all(
            length is None or not isinstance(its, int) or its == length
            for its, length in zip(its_shape, shape, strict=True)
        )
        if number not in (None, its_number) or not fits:
            raise BundleError(
                f"{graph} isn't what config.json describes: its {kind} {name} is {its_number} {shown(list(its_shape))},"
                f" not {number or 'numbers'} {['any' if length is None else length for length in shape]}"
            )
