"""Provides sequences of strings that are computed or decoded one at a time, to save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import overload

import numpy as np


class LazyStrings(Sequence[str]):
    """A sequence of strings, each computed when it is read.

    Args:
      length: number of strings.
      make: index in 0..length-1 -> string.
    """

    def __init__(self, length: int, make: Callable[[int], str]) -> None:
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
    """Returns the index counted from the front.

    Args:
      index: may be negative, counted from the end.
      length: number of items.

    Returns:
      0..length-1.

    Raises:
      IndexError: there is no such item, which also ends iteration.
    """
    if not -length <= index < length:
        raise IndexError(f"index {index} of {length}")
    return int(index) % length


def pack_strings(strings: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes strings as one array of bytes.

    Args:
      strings: [N].

    Returns:
      UTF-8 of all strings, uint8 [bytes], and their offsets, int64 [N + 1].
    """
    flat, ends = bytearray(), [0]
    for string in strings:
        flat += string.encode("utf-8", "surrogatepass")
        ends.append(len(flat))
    return np.frombuffer(bytes(flat), np.uint8), np.array(ends, np.int64)


def unpack_strings(flat: np.ndarray, offsets: np.ndarray) -> LazyStrings:
    """Returns the strings that `pack_strings` packed, decoded when they are read.

    Args:
      flat: uint8 [bytes], UTF-8.
      offsets: int64 [N + 1].

    Returns:
      [N] strings.
    """

    def make(index: int) -> str:
        return flat[offsets[index] : offsets[index + 1]].tobytes().decode("utf-8", "surrogatepass")

    return LazyStrings(len(offsets) - 1, make)
