"""Approximate search in files: codes propose photos, by Hamming distance, features order them.

Many photos may have one code: "no picture yet" under thousands of products. Such a crowd would
fill the list of candidates with itself, so it does not count towards them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sicot_jax.index.backends.base import MAX_WIDENING, Neighbour, Neighbours
from sicot_jax.index.storage.vectors import cosine_similarities, import_faiss

# A code is a crowd where it has more than this share of a list of candidates, and than this many.
_CROWD_SHARE, _MIN_CROWD = 1 / 8, 8
# Odd numbers that mix the words of a code into one, so that equal codes are found by a sort.
_MIXER = np.random.default_rng(0).integers(1 << 63, size=512, dtype=np.uint64) * 2 + 1
_OUT = np.iinfo(np.int32).max


def nearest_codes(
    code: np.ndarray,
    codes: np.ndarray,
    count: int,
    is_deleted: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Finds the codes nearest by Hamming distance; crowds of equal codes do not count.

    Args:
      code: the query's code, uint8 [bits / 8].
      codes: uint8 [N, bits / 8].
      count: how many.
      is_deleted: indices -> whether they are deleted, bool; asked of crowds alone.

    Returns:
      Indices, int64: the `count` nearest; where crowds are among them, `count` of other codes and
      the first of each crowd that are not deleted, some `MAX_WIDENING` times `count`.
    """
    count = min(count, len(codes))
    if not count:
        return np.zeros(0, np.int64)
    faiss = import_faiss()
    # Of this thread: a request has one thread, more would wait for each other.
    faiss.omp_set_num_threads(1)
    nearest = faiss.knn_hamming(code[None], codes, count, variant="hc")[1][0]
    if count == len(codes):
        return nearest
    crowds = find_crowds(take_codes(codes, nearest))
    if not len(crowds):
        return nearest
    distances = np.bitwise_count(_words(codes) ^ _words(code[None])).sum(1, dtype=np.int32)
    members, most = np.zeros(0, np.int64), MAX_WIDENING * count
    while len(crowds) and len(members) < most:
        for crowd in crowds:
            distance = np.bitwise_count(crowd ^ code).sum(dtype=np.int32)
            equal = np.flatnonzero(distances == distance)
            equal = equal[(codes[equal] == crowd).all(1)]
            distances[equal] = _OUT
            members = np.append(members, equal[~is_deleted(equal)][:most])
        nearest = np.argpartition(distances, count - 1)[:count]
        nearest = nearest[distances[nearest] != _OUT]
        crowds = find_crowds(take_codes(codes, nearest))
    return np.append(nearest, members)


def find_crowds(codes: np.ndarray) -> np.ndarray:
    """Finds crowds: codes that so many rows share that they fill the list of candidates.

    Args:
      codes: codes of the list, uint8 [N, bits / 8].

    Returns:
      Each code with more than an eighth of the list and more than eight places, uint8
      [crowds, bits / 8].
    """
    least = max(int(len(codes) * _CROWD_SHARE), _MIN_CROWD)
    words = _words(codes)
    keys = (words * _MIXER[: words.shape[1]]).sum(1, dtype=np.uint64)
    ordered = np.sort(keys)
    crowded = np.unique(ordered[least:][ordered[least:] == ordered[:-least]])
    return codes[[int(np.argmax(keys == key)) for key in crowded]]


def take_codes(codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Gathers codes, eight bytes at a time where codes have as many: twice as fast.

    Args:
      codes: uint8 [N, bits / 8].
      rows: int [M].

    Returns:
      Codes, uint8 [M, bits / 8].
    """
    return _words(codes).take(rows, axis=0).view(np.uint8)


def _words(codes: np.ndarray) -> np.ndarray:
    return codes.view(np.uint64) if codes.shape[1] % 8 == 0 else codes


def rank_photos(
    features: np.ndarray,
    row_products: np.ndarray,
    query: np.ndarray,
    rows: np.ndarray,
    counts: tuple[int, int],
) -> Neighbours:
    """Puts candidates in order by their cosine with a query.

    Args:
      features: unit embeddings, float16 [N, D].
      row_products: product id of each row, int32 [N].
      query: unit embedding, float32 [D].
      rows: the candidates, int [M].
      counts: how many products and photos are wanted.

    Returns:
      The products by their nearest photos, and the nearest photos; of equal ones lower rows first.
    """
    rows = np.sort(rows)  # reads the map in one direction
    similarity = cosine_similarities(features, rows, query)
    order = np.argsort(-similarity, kind="stable")
    products = row_products[rows[order]]
    _, first = np.unique(products, return_index=True)

    def neighbours(ranks: np.ndarray) -> list[Neighbour]:
        at = order[ranks]
        columns = products[ranks].tolist(), rows[at].tolist(), similarity[at].tolist()
        return [Neighbour(*line) for line in zip(*columns, strict=True)]

    num_products, num_photos = counts
    photos = np.arange(min(num_photos, len(order)))
    return Neighbours(neighbours(np.sort(first)[:num_products]), neighbours(photos))
