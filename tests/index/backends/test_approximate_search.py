"""Search among many photos of one code ("no picture yet") finds what search without them does."""

import contextlib

import numpy as np
import pytest
from helpers import placeholders
from helpers.placeholders import CANDIDATES, QUERIES, SIZE, K

from sicot_jax.index.backends.approximate_search import find_crowds, nearest_codes
from sicot_jax.index.backends.open import open_index, publish_index
from sicot_jax.index.storage import inverted_lists, layout
from sicot_jax.index.storage.inverted_lists import InvertedLists
from sicot_jax.indexing.split import split_index
from sicot_jax.indexing.update import remove_products


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return placeholders.write_index(tmp_path_factory.mktemp("crowd") / "index")


def similarities(version, queries, url="", **options):
    with contextlib.closing(open_index(version, url)) as opened:
        near = opened.nearest(queries, K, candidates=CANDIDATES, **options)
    return [[n.similarity for n in one.products] for one in near]


def test_recall_in_files(version):
    queries = placeholders.near_placeholder(version)
    assert len(queries) == QUERIES
    found = placeholders.recall(version, queries, similarities(version, queries))
    assert found >= placeholders.recall_without(version, queries) >= 0.95
    # Near the placeholder the answers are its products, the first of them.
    placeholder = placeholders.VectorsWithPlaceholders(0).placeholder
    with contextlib.closing(open_index(version)) as opened:
        near = opened.nearest(placeholder[None], K, num_photos=5)[0]
        equal = np.flatnonzero(opened._snapshot.features @ placeholder > 0.999)
    assert [n.row for n in near.products] == equal[:K].tolist()
    assert [n.row for n in near.photos] == equal[:5].tolist()


@pytest.fixture
def small_lists(monkeypatch):
    """Lists of some 50 rows, of which a third is probed."""
    monkeypatch.setattr(inverted_lists, "ROWS_PER_LIST", 50)
    monkeypatch.setattr(inverted_lists, "MIN_ROWS", 2_000)
    monkeypatch.setattr(inverted_lists, "PROBE_FACTOR", 4)


def test_recall_with_inverted_lists(small_lists, tmp_path):
    found = []
    for share in (0.2, 0):
        version = placeholders.write_index(tmp_path / str(share), share)
        placeholders.use_lists(version)
        queries = placeholders.near_placeholder(version)
        found.append(placeholders.recall(version, queries, similarities(version, queries)))
        lists = InvertedLists(version, SIZE, placeholders.WIDTH)
        assert np.diff(lists._ends).min() > 0
        assert len(np.unique(lists._centroids, axis=0)) == len(lists._centroids)
        # Every list can be reached, in the graph too.
        assert sorted(lists.probe(queries[0], 0, SIZE, SIZE)) == list(range(SIZE))
    assert found[0] >= found[1] - 0.01


def test_equal_centroids_of_an_older_index(tmp_path, monkeypatch):
    """Lists that are empty, and a graph that returns too few of them, are made up for."""
    version = placeholders.write_index(tmp_path / "index")
    faiss = inverted_lists.import_faiss()
    features = np.fromfile(version / layout.FEATURES, np.float16).reshape(SIZE, -1)
    centroids = np.repeat(features[:1], 300, axis=0).astype(np.float32)
    centroids[250:] = features[-50:]
    graph = faiss.IndexHNSWFlat(features.shape[1], 4, faiss.METRIC_INNER_PRODUCT)
    graph.add(centroids)
    faiss.write_index(graph, str(version / layout.CENTROIDS))
    ends = np.zeros(301, np.int32)
    ends[251:] = np.linspace(0, SIZE, 51)[1:]
    np.append(ends, np.arange(SIZE, dtype=np.int32)).tofile(version / layout.POSTING_LISTS)
    lists = InvertedLists(version, SIZE, features.shape[1])
    for query in placeholders.near_placeholder(version)[:5]:
        assert len(lists.probe(query, 0, SIZE, 4000)) >= 2000


def test_recall_in_shards(version, tmp_path):
    split_index(version.parent, tmp_path / "parts", 3)
    queries = placeholders.near_placeholder(version)
    parts = layout.current_version(tmp_path / "parts")
    found = placeholders.recall(version, queries, similarities(parts, queries))
    assert found >= placeholders.recall_without(version, queries)


@pytest.mark.slow
@pytest.mark.database
def test_recall_in_postgres(version, database_server):
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(database_server.url(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE crowd")
    url = database_server.url("crowd")
    publish_index(version.parent, url)
    queries = placeholders.near_placeholder(version)
    without = placeholders.recall_without(version, queries)
    for category in (None, ""):
        found = similarities(version, queries, url, category=category)
        assert placeholders.recall(version, queries, found) >= without - 0.02
    placeholder = placeholders.VectorsWithPlaceholders(0).placeholder[None]
    assert similarities(version, placeholder, url) == similarities(version, placeholder)
    with contextlib.closing(open_index(version, url)) as copy, copy._connection() as connection:
        code = "".join(map(str, np.unpackbits(copy.encoder.encode(placeholder)[0])))
        values = {"k": K, "photos": 0, "category": None}
        values |= {"query": f"[{','.join(map(str, placeholder[0]))}]", "code": code}
        for scope in ("codes", "all codes"):
            assert copy._execute(connection, values, scope, CANDIDATES).codes == CANDIDATES


def test_crowd_that_was_deleted(tmp_path):
    """Products behind it are found, and its members that are left."""
    version = placeholders.write_index(tmp_path / "index")
    queries = placeholders.near_placeholder(version)
    features = np.fromfile(version / layout.FEATURES, np.float16).reshape(SIZE, -1)
    placeholder = placeholders.VectorsWithPlaceholders(0).placeholder
    equal = np.flatnonzero(features.astype(np.float32) @ placeholder > 0.999)
    remove_products(version.parent, [f"sku-{n}" for n in equal[:-3]], max_change_share=1)
    found = placeholders.recall(version, queries, similarities(version, queries))
    assert found >= placeholders.recall_without(version, queries)
    with contextlib.closing(open_index(version)) as opened:
        near = opened.nearest(placeholder[None], K)[0].products
    assert [n.row for n in near[:3]] == equal[-3:].tolist()


def test_crowds_do_not_count():
    """By hand: the query's code is 0; 50 times 1 bit, 50 times 2 others, then one code each."""
    codes = np.zeros((120, 8), np.uint8)
    codes[:50, 0], codes[50:100, 1] = 1, 3
    codes[100:, 2:] = 255
    codes[100:, 1] = np.arange(20)
    found = nearest_codes(np.zeros(8, np.uint8), codes, 20, lambda rows: rows % 2 == 1)
    # Of each crowd those with even numbers, and 20 others.
    assert sorted(found) == [*range(0, 100, 2), *range(100, 120)]
    assert find_crowds(codes)[:, :2].tolist() in ([[1, 0], [0, 3]], [[0, 3], [1, 0]])
    assert find_crowds(codes[100:]).shape == (0, 8)
    assert find_crowds(codes[:8]).shape == (0, 8)  # too few to say
