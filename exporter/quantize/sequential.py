"""A network in fp32, and the same with the matrices that are quantised already, side by side on the same texts.

While a graph is being built both are taken through it, from one matrix to the next. So each matrix is quantised for
what the quantised ones before it let through (that inputs are rounded, too, is left out), and for what the fp32 network
makes of the texts there.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ...models import contract
from ...runtime.ort import devices, providers
from .inputs import HeadInputs, Moments

Array = npt.NDArray[np.float32]
# Gives the part of a graph, serialised, that makes the values of some names out of those of others and of a prompt.
Part = Callable[[Sequence[str], Collection[str]], bytes]


class Twins:
    """Both networks at one place of the graph.

    Args:
        tokens: the texts, int64 [texts, length].
        head: what reaches the output head in fp32; None where it isn't known.
        gradients: second moments of the loss' gradients by matrices' outputs, by their layers, as far as they are known.
        threads: of one operator.
    """

    def __init__(
        self, tokens: npt.NDArray[np.int64], head: HeadInputs | None, gradients: Mapping[str, Array], *, threads: int
    ) -> None:
        self.head, self.gradients = head, gradients
        self._tokens, self._threads = tokens, threads
        # The graph's values there, float32 [2, texts, length, width]: the fp32 network's, then the other's.
        self._values: dict[str, Array] = {}
        self._outputs: Array  # of the last matrix, of either network as soon as it is known

    def look_up(self, name: str, exact: Array, rounded: Array) -> None:
        """Begins with the tokens' embeddings: the graph's value `name`, from either network's [vocabulary, width]."""
        self._values = {name: np.stack([exact[self._tokens], rounded[self._tokens]])}

    def reach(self, part: Part, x: str, beside: str, weight: Array, bias: Array) -> Moments | None:
        """Goes on to the input of a matrix.

        Args:
            part: gives parts of the graph.
            x: the input's name.
            beside: another value that is needed after the matrix.
            weight: of the fp32 network, [in, out].
            bias: of the fp32 network, [out].

        Returns:
            What reaches the matrix, and what the fp32 network makes of it; None where numbers overflow.
        """
        wanted = [name for name in (x, beside) if name not in self._values]
        if wanted:
            self._run(part(wanted, self._values.keys()), wanted)
        self._values = {name: self._values[name] for name in (x, beside)}
        exact, ours = self._values[x]
        self._outputs = np.empty((2, *self._tokens.shape, len(bias)), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            outputs = _multiply(exact, weight, bias, self._outputs[0])
            moments = Moments.of(ours.reshape(-1, len(weight)), outputs)
        return moments if np.isfinite(moments.covariance).all() and np.isfinite(moments.cross).all() else None

    def multiply(self, x: str, product: str, weight: Array, bias: Array) -> None:
        """Goes on to the matrix' output, the graph's value `product`, with the other network's weight and bias."""
        ours = self._values.pop(x)[1]
        with np.errstate(over="ignore", invalid="ignore"):
            _multiply(ours, weight, bias, self._outputs[1])
        self._values[product] = self._outputs

    def _run(self, model: bytes, wanted: Sequence[str]) -> None:
        network = providers.open_graph(model, devices.CPU, threads=self._threads, name=wanted[0])
        texts, length = self._tokens.shape
        prompt: dict[str, npt.NDArray[np.generic]] = {
            contract.ATTENTION_MASK: np.ones((2, length), np.int64),
            contract.POSITION_IDS: np.tile(np.arange(length), (2, 1)),
        }
        fed = [each.name for each in network.get_inputs()]
        found: dict[str, Array] = {}
        for text in range(texts):
            feeds = {
                name: prompt[name] if name in prompt else np.ascontiguousarray(self._values[name][:, text])
                for name in fed
            }
            for name, output in zip(wanted, providers.run(network, wanted, feeds), strict=True):
                if name not in found:
                    found[name] = np.empty((2, texts, *output.shape[1:]), np.float32)
                found[name][:, text] = output
        self._values |= found


def _multiply(x: Array, weight: Array, bias: Array, out: Array) -> Array:
    """x @ weight + bias into `out`, and that without its first axes: [count, out]. Large arrays are slow to allocate."""
    flat = out.reshape(-1, len(bias))
    np.matmul(x.reshape(-1, len(weight)), weight, out=flat)
    flat += bias
    return flat
