"""PyTorch's stream of random words, of which only those that matter are worked out.

A draw takes two words for each entry of a vocabulary, though few entries can win it. MT19937 makes words by the
block: a twist renews all 624 of its state, then each word is tempered by itself. Twisting is the small part, so
NumPy's own code is made to twist block after block, and asked only for the words that are wanted.
Source: Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8 (1998), section 2.
"""

import ctypes
from typing import Any, cast

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

_BLOCK = 624
_FEW = 400  # where fewer entries than one in so many are wanted, the others are skipped


class MersenneTwister:
    """MT19937, seeded as NumPy's legacy RandomState and PyTorch's CPU generator are.

    Args:
        seed: counts modulo 2**32; a fresh one where None.
    """

    def __init__(self, seed: int | None) -> None:
        self._bits = np.random.MT19937()
        if seed is not None:
            self._bits.state = cast("Any", np.random.RandomState(seed % 2**32).get_state(legacy=False))
        self._draws = np.random.Generator(self._bits)
        interface = self._bits.ctypes
        self._address = interface.state_address
        # A pointer to NumPy's function that keeps the interpreter's lock: it runs for a quarter of a microsecond.
        function = ctypes.cast(interface.next_uint32, ctypes.c_void_p).value
        self._next = ctypes.PYFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p)(cast("int", function))
        memory = (ctypes.c_uint32 * (_BLOCK + 1)).from_address(self._address)
        self._state: Words = np.ctypeslib.as_array(memory)
        self._position = ctypes.c_uint32.from_address(self._address + 4 * _BLOCK)
        # The state's place in memory is documented, how it lies there isn't.
        self._known = self._lies_as_expected()

    def pairs(self, entries: int, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Takes two words for each entry from the stream, and returns those of some entries.

        Args:
            entries: how many there are.
            wanted: indices of entries, at least one, rising, int64 [wanted].

        Returns:
            uint64 [wanted], the first word in the upper half.
        """
        if not self._known or len(wanted) * _FEW > entries:
            pairs = self._draws.integers(0, 2**64, size=entries, dtype=np.uint64)
            return pairs if len(wanted) == entries else pairs[wanted]
        position, following, address, start = self._position, self._next, self._address, self._position.value
        words, block = [], 0
        for entry in wanted.tolist():
            block = self._move(block, start + 2 * entry)
            words.append(following(address) << 32 | following(address))
            block += position.value == 1  # its last word came first: NumPy has twisted
        self._move(block, start + 2 * entries)
        return np.array(words, np.uint64)

    def skip(self, entries: int) -> None:
        """Takes two words for each entry from the stream."""
        if self._known:
            self._move(0, self._position.value + 2 * entries)
        else:
            self._draws.integers(0, 2**64, size=entries, dtype=np.uint64)

    def _move(self, block: int, word: int) -> int:
        """Moves on to a word, counted from the start of the block with number 0, from another block to its own."""
        position, following, address = self._position, self._next, self._address
        last, place = divmod(word, _BLOCK)
        for _ in range(last - block):
            position.value = _BLOCK  # all its words are used: the next one makes NumPy twist
            following(address)
        position.value = place
        return last

    def _lies_as_expected(self) -> bool:
        state = cast("Any", self._bits.state)["state"]
        return np.array_equal(self._state[:_BLOCK], state["key"]) and self._position.value == state["pos"]
