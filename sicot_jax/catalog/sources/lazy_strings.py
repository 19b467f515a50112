"""Sequences of strings that are computed or decoded one at a time, so that a million of them cost
little memory.

And the count of a noun in messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import overload

import numpy as np


def counted(number: int, noun: str) -> str:
    """ "1 class", "2 classes", "3 photos"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"


class LazyStrings(Sequence[str]):
    """`length` strings, string i being `make(i)`."""

    def __init__(self, length: int, make: Callable[[int], str]):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        return self._make(checked_index(index, self._length))


def checked_index(index: int, length: int) -> int:
    """`index` counted from the front. Raises IndexError where there is no such item (which also
    ends iteration).
    """
    if not -length <= index < length:
        raise IndexError(f"index {index} of {length}")
    return int(index) % length


def pack_strings(strings: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """UTF-8 of all strings, uint8 [bytes], and where each begins and the last ends, int64 [N + 1]."""
    flat, ends = bytearray(), [0]
    for string in strings:
        flat += string.encode("utf-8", "surrogatepass")
        ends.append(len(flat))
    return np.frombuffer(bytes(flat), np.uint8), np.array(ends, np.int64)


def unpack_strings(flat: np.ndarray, offsets: np.ndarray) -> LazyStrings:
    """The strings that `pack_strings` packed, decoded when read."""

    def make(index: int) -> str:
        return flat[offsets[index] : offsets[index + 1]].tobytes().decode("utf-8", "surrogatepass")

    return LazyStrings(len(offsets) - 1, make)
