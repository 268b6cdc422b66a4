"""PyTorch's stream of random words, of which only those that matter are worked out.

A draw takes two words for each entry of a vocabulary, though few entries can win it. MT19937 makes words by the
block: a twist renews all 624 of its state, then each word is tempered by itself. Twisting is the small part, so
blocks are twisted one after another by NumPy's own code, and words are tempered where they are asked for.
Source: Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8 (1998), section 2.
"""

import ctypes
from typing import Any, cast

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

_BLOCK = 624
_11, _7, _15, _18 = np.array([11, 7, 15, 18], np.uint32)
_MASK_B, _MASK_C = np.array([0x9D2C5680, 0xEFC60000], np.uint32)
_FEW = 16  # where fewer entries than one in so many are wanted, blocks are twisted by hand


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
        # Words from the start of the current block on.
        first = 2 * wanted + self._position.value
        block, place = np.divmod(np.stack([first, first + 1]), _BLOCK)
        blocks = self._blocks(2 * entries, set(block.ravel().tolist()))
        raw = np.concatenate(list(blocks.values())).reshape(-1, _BLOCK)
        upper, lower = _tempered(raw[np.searchsorted(list(blocks), block), place]).astype(np.uint64)
        words: npt.NDArray[np.uint64] = upper << np.uint64(32) | lower
        return words

    def skip(self, entries: int) -> None:
        """Takes two words for each entry from the stream."""
        if self._known:
            self._blocks(2 * entries, set())
        else:
            self._draws.integers(0, 2**64, size=entries, dtype=np.uint64)

    def _blocks(self, count: int, wanted: set[int]) -> dict[int, Words]:
        """Moves on by so many words, and returns some of the blocks on the way, by their number, untempered."""
        position, following, address, key = self._position, self._next, self._address, self._state[:_BLOCK]
        last, rest = divmod(position.value + count, _BLOCK)
        passed = {0: key.copy()} if 0 in wanted else {}
        for block in range(1, last + 1):
            position.value = _BLOCK  # all its words are used: the next one makes NumPy twist
            following(address)
            if block in wanted:
                passed[block] = key.copy()
        position.value = rest
        return passed

    def _lies_as_expected(self) -> bool:
        state = cast("Any", self._bits.state)["state"]
        return np.array_equal(self._state[:_BLOCK], state["key"]) and self._position.value == state["pos"]


def _tempered(words: Words) -> Words:
    words = words ^ (words >> _11)
    words ^= (words << _7) & _MASK_B
    words ^= (words << _15) & _MASK_C
    tempered: Words = words ^ (words >> _18)
    return tempered
