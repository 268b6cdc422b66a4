"""The largest entries, in the order in which PyTorch's CPU build returns them, ties included.

Where all chosen values differ, there is one order. Among equal values, `torch.topk` takes those that
its algorithm happens to come by: libstdc++'s partial_sort for few entries out of many, else its
nth_element and sort. Beam sampling meets ties as soon as fewer tokens are possible than candidates
wanted, so their order decides about tokens. Source: ATen/native/TopKImpl.h; bits/stl_algo.h and
bits/stl_heap.h of GCC, whose steps are followed here.
"""

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]
Entry = tuple[float, int]  # value and index

_GROUP = 32  # entries at least
_LEADERS, _ENOUGH = 512, 8  # 512 groups and 8 leaders per wanted entry: the bound is close
_SMALL = 16  # entries that std::sort leaves to insertion sort


def largest(values: Values, count: int) -> npt.NDArray[np.int64]:
    """Indices of the `count` largest values, the largest first; as torch.topk gives them.

    Args:
        values: float32 [entries], no NaN.
        count: how many, from 0; all where there are fewer.
    """
    count = min(count, len(values))
    if count == 0:
        return np.zeros(0, np.int64)
    candidates = best(values, count)
    chosen = values[candidates]
    order = np.argsort(-chosen)
    ranked = chosen[order]
    if len(ranked) == count and (ranked[1:] < ranked[:-1]).all():
        return candidates[order]
    return np.array(_partial_sort(values, count) if count * 64 <= len(values) else _nth_element(values, count))


def best(values: Values, k: int) -> npt.NDArray[np.int64]:
    """Indices of the k largest values and of all that tie with the last of them, rising; of at least k values."""
    # The largest of each of many groups are that many entries, so the k-th of them bounds the k-th of all from below.
    groups = min(len(values) // _GROUP, max(_ENOUGH * k, _LEADERS))
    if k > groups:
        return np.flatnonzero(values >= np.partition(values, len(values) - k)[len(values) - k])
    size = len(values) // groups
    leaders = values[: size * groups].reshape(size, groups).max(axis=0)
    near: npt.NDArray[np.int64] = np.flatnonzero(values >= np.partition(leaders, groups - k)[groups - k])
    chosen = values[near]
    winners: npt.NDArray[np.int64] = near[chosen >= np.partition(chosen, len(chosen) - k)[len(chosen) - k]]
    return winners


def ascending(values: Values) -> npt.NDArray[np.int64]:
    """Indices from the smallest value to the largest, as torch.sort gives them: by std::sort, ties included.

    Slow, and needed only where the order of equal values matters.
    """
    entries = list(zip((-values).tolist(), range(len(values)), strict=True))
    _sort(entries, 0, len(entries))
    return np.array([index for _, index in entries])


def _partial_sort(values: Values, count: int) -> list[int]:
    """std::partial_sort: a heap of `count` entries with the smallest on top, where larger ones replace it."""
    heap = [(float(value), index) for index, value in enumerate(values[:count])]
    for parent in range((count - 2) // 2, -1, -1):
        _sift(heap, parent, count, heap[parent])
    # The top only grows, so what doesn't exceed it now never will. It is looked at again whenever as many have passed.
    begin = count
    while begin < len(values):
        for index in (np.flatnonzero(values[begin : 2 * begin] > heap[0][0]) + begin).tolist():
            value = float(values[index])
            if value > heap[0][0]:
                _sift(heap, 0, count, (value, index))
        begin *= 2
    for end in range(count - 1, 0, -1):
        last, heap[end] = heap[end], heap[0]
        _sift(heap, 0, end, last)
    return [index for _, index in heap]


def _sift(heap: list[Entry], hole: int, end: int, entry: Entry) -> None:
    """Fills a hole in the heap: smaller children move up to the bottom, then the entry rises to its place."""
    top = hole
    child = hole
    while child < (end - 1) // 2:
        child = 2 * child + 2
        if heap[child][0] > heap[child - 1][0]:
            child -= 1
        heap[hole] = heap[child]
        hole = child
    if end % 2 == 0 and child == (end - 2) // 2:
        child = 2 * child + 1
        heap[hole] = heap[child]
        hole = child
    while hole > top and heap[(hole - 1) // 2][0] > entry[0]:
        heap[hole] = heap[(hole - 1) // 2]
        hole = (hole - 1) // 2
    heap[hole] = entry


def _nth_element(values: Values, count: int) -> list[int]:
    """std::nth_element for the last of the `count` largest, then std::sort of those before it."""
    entries = list(zip(values.tolist(), range(len(values)), strict=True))
    first, end = 0, len(entries)
    while end - first > 3:
        cut = _partition(entries, first, end)
        if cut <= count - 1:
            first = cut
        else:
            end = cut
    _insertion_sort(entries, first, end)
    _sort(entries, 0, count - 1)
    return [index for _, index in entries[:count]]


def _sort(entries: list[Entry], first: int, end: int) -> None:
    """std::sort: quicksort down to short stretches, then insertion sort over everything."""
    stretches = [(first, end)]
    while stretches:
        begin, stop = stretches.pop()
        if stop - begin > _SMALL:
            cut = _partition(entries, begin, stop)
            stretches += [(begin, cut), (cut, stop)]
    _insertion_sort(entries, first, end)


def _insertion_sort(entries: list[Entry], first: int, end: int) -> None:
    # Insertion sort keeps the order of equal entries, and so does Python's own.
    entries[first:end] = sorted(entries[first:end], key=lambda entry: -entry[0])


def _partition(entries: list[Entry], first: int, end: int) -> int:
    """Parts entries around the median of three of them; returns where the smaller ones begin."""
    a, b, c = first + 1, (first + end) // 2, end - 1
    one, two, three = entries[a][0], entries[b][0], entries[c][0]
    if one > two:
        median = b if two > three else c if one > three else a
    else:
        median = a if one > three else c if two > three else b
    entries[first], entries[median] = entries[median], entries[first]
    pivot = entries[first][0]
    left, right = first + 1, end
    while True:
        while entries[left][0] > pivot:
            left += 1
        right -= 1
        while pivot > entries[right][0]:
            right -= 1
        if left >= right:
            return left
        entries[left], entries[right] = entries[right], entries[left]
        left += 1
