"""Find the zero pages in a buffer without a Python loop per page.

A page whose first, last and two middle words are not all zero is not a zero page: four strided looks in C settle nearly
all. Runs of pages that may be zero are then compared whole by memcmp(3), and halved only where that fails. The
buffer is local memory; offsets are bytes into it.
"""

from __future__ import annotations

import itertools
import operator
from ctypes import addressof, c_char, c_int, c_size_t, c_void_p

from agent.kernel.libc import libc
from agent.types import PAGE_SIZE

_WORDS = PAGE_SIZE // 8
_ZEROS = (c_char * (1 << 20))()
_ZEROS_ADDRESS = addressof(_ZEROS)

_memcmp = libc["memcmp"]
_memcmp.argtypes = (c_void_p, c_void_p, c_size_t)
_memcmp.restype = c_int


def is_zero(address: int, length: int) -> bool:
    """Say whether `length` bytes (at most 1 MiB) at a local address are all zero."""
    return not _memcmp(address, _ZEROS_ADDRESS, length)


def zero_runs(words: memoryview, address: int, length: int) -> list[tuple[int, int]]:
    """Return the runs of zero pages in the first `length` bytes, as sorted [start, end) byte offsets, coalesced.

    `words` is the buffer cast to "Q", `address` where it lies.
    """
    nr_words = length // 8
    if not nr_words:
        return []
    first = words[0:nr_words:_WORDS].tolist()
    if 0 not in first:
        return []
    samples = map(
        operator.or_,
        map(operator.or_, first, words[_WORDS - 1 : nr_words : _WORDS].tolist()),
        map(
            operator.or_,
            words[_WORDS // 3 : nr_words : _WORDS].tolist(),
            words[2 * _WORDS // 3 : nr_words : _WORDS].tolist(),
        ),
    )
    maybe = bytes(map(operator.not_, samples))
    runs: list[tuple[int, int]] = []
    position = maybe.find(1)
    while position >= 0:
        end = maybe.find(0, position)
        end = len(maybe) if end < 0 else end
        _confirm(runs, address, position, end)
        position = maybe.find(1, end)
    return [(low * PAGE_SIZE, high * PAGE_SIZE) for low, high in runs]


def _confirm(runs: list[tuple[int, int]], address: int, low: int, high: int) -> None:
    # Append what is zero of the candidate pages [low, high).
    if is_zero(address + low * PAGE_SIZE, (high - low) * PAGE_SIZE):
        if runs and runs[-1][1] == low:
            low = runs.pop()[0]
        runs.append((low, high))
    elif high - low > 1:
        middle = (low + high) // 2
        _confirm(runs, address, low, middle)
        _confirm(runs, address, middle, high)


def gaps(runs: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Return what `runs` leave of [0, length)."""
    starts = itertools.chain((0,), (end for _, end in runs))
    ends = itertools.chain((start for start, _ in runs), (length,))
    return [(low, high) for low, high in zip(starts, ends) if low < high]
