"""Search in the files of a version, against all similarities."""

import gc
import threading

import numpy as np
import pytest
from helpers.small_index import BITS, PHOTOS, PRODUCTS, WIDTH

from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing.update import remove_products, update_products


@pytest.fixture
def opened(index):
    local_index = LocalIndex(layout.current_version(index))
    yield local_index
    local_index.close()


def queries(count=20):
    return np.random.default_rng(1).random((count, WIDTH)).astype(np.float32)


def exact(opened, embedding, k, allowed=None):
    """(product, similarity) of the nearest products by features alone."""
    num_rows = PRODUCTS * PHOTOS
    vectors = VectorFiles(opened.folder, WIDTH, BITS)
    similarity = np.asarray(vectors.memmap(layout.FEATURES, num_rows), np.float32) @ l2_normalize(
        embedding
    )
    best = {}
    for owner, value in zip(
        vectors.memmap(layout.ROW_PRODUCTS, num_rows).tolist(), similarity.tolist(), strict=True
    ):
        if allowed is None or owner in allowed:
            best[owner] = max(best.get(owner, -2), value)
    return sorted(best.items(), key=lambda item: -item[1])[:k]


def search(opened, embedding, k, **more):
    return [
        (n.product_id, n.similarity) for n in opened.nearest(embedding[None], k, **more)[0].products
    ]


@pytest.mark.parametrize("k", [1, 3, PRODUCTS])
def test_nearest_products_are_exact(opened, k):
    for embedding in queries():
        actual, wanted = search(opened, embedding, k), exact(opened, embedding, k)
        assert [product for product, _ in actual] == [product for product, _ in wanted]
        np.testing.assert_allclose([s for _, s in actual], [s for _, s in wanted], rtol=1e-6)


@pytest.mark.parametrize("k", [0, 2])
def test_nearest_photos_are_exact(opened, k):
    """Photos of any product; fewer where there are fewer."""
    vectors, num_rows = VectorFiles(opened.folder, WIDTH, BITS), PRODUCTS * PHOTOS
    owners = vectors.memmap(layout.ROW_PRODUCTS, num_rows)
    for embedding in queries():
        cosine = np.asarray(vectors.memmap(layout.FEATURES, num_rows), np.float32) @ l2_normalize(
            embedding
        )
        order = np.argsort(-cosine, kind="stable")
        near = opened.nearest(embedding[None], k, num_photos=5)[0]
        assert [(n.row, n.product_id) for n in near.photos] == [(p, owners[p]) for p in order[:5]]
        np.testing.assert_allclose(
            [n.similarity for n in near.photos], cosine[order[:5]], rtol=1e-6
        )
        assert len(near.products) == k
    assert len(opened.nearest(queries(1), k, num_photos=num_rows + 9)[0].photos) == num_rows


def test_batch_equals_single_queries(opened):
    some = queries(3)
    assert opened.nearest(some, 2, num_photos=3) == [
        opened.nearest(query[None], 2, num_photos=3)[0] for query in some
    ]


def test_candidates_are_widened_until_there_are_k_products(opened):
    for embedding in queries(5):
        assert len(search(opened, embedding, PRODUCTS, candidates=1)) == PRODUCTS
        assert len(search(opened, embedding, PRODUCTS + 3)) == PRODUCTS


def test_search_is_restricted_to_a_category(opened):
    for embedding in queries(5):
        wanted = exact(opened, embedding, 2, allowed={1, 3, 5})
        assert [p for p, _ in search(opened, embedding, 2, category="kind 1")] == [
            p for p, _ in wanted
        ]
    assert search(opened, queries(1)[0], 2, category="nothing") == []


def test_deleted_product_is_not_returned_after_refresh(index, opened):
    embedding = queries(1)[0]
    best = exact(opened, embedding, 1)[0][0]
    remove_products(index, [f"sku-{best}"])
    assert search(opened, embedding, 1)[0][0] == best  # as of the last refresh
    assert opened.products([best]) == [None]  # but its record is deleted
    assert opened.refresh()
    assert not opened.refresh()
    left = set(range(PRODUCTS)) - {best}
    assert [p for p, _ in search(opened, embedding, PRODUCTS)] == [
        p for p, _ in exact(opened, embedding, 9, left)
    ]
    assert opened.counts() == {"products": PRODUCTS - 1, "photos": PRODUCTS * PHOTOS}


def test_query_of_zeros_is_answered(opened):
    assert len(search(opened, np.zeros(WIDTH), 2)) == 2


def test_missing_index_is_one_line(tmp_path):
    with pytest.raises(
        InputError, match="no product index there; make one with `sicot index build"
    ):
        layout.current_version(tmp_path)
    (tmp_path / "current").write_text("../../etc\n")
    with pytest.raises(InputError, match=r"names '../../etc', wanted a version"):
        layout.current_version(tmp_path)


def test_refresh_sees_changes_from_any_thread(index, opened):
    """SQLite counts commits for each connection, so all threads share one."""
    seen = []
    for product in range(4):
        remove_products(index, [f"sku-{product}"])
        thread = threading.Thread(target=lambda: seen.append(opened.refresh()))
        thread.start()
        thread.join()
        assert opened.counts()["products"] == PRODUCTS - 1 - product
    assert seen == [True] * 4


def test_product_changes_its_category(index, opened, tmp_path):
    """It is returned in the new category, which may be a new one, and not in the old one."""
    for name in ("kind 0", "fresh"):
        (tmp_path / "move.csv").write_text(f"sku,category\nsku-1,{name}\n")
        update_products(index, tmp_path / "move.csv")
        assert opened.refresh()
        for embedding in queries(3):
            inside = {p for p, _ in search(opened, embedding, 9, category=name)}
            assert inside == ({0, 1, 2, 4} if name == "kind 0" else {1})
            assert {p for p, _ in search(opened, embedding, 9, category="kind 1")} == {3, 5}
            assert 1 in {p for p, _ in search(opened, embedding, 9)}


def test_reading_threads_keep_a_replaced_index_open(index):
    """The store is closed with the last reference."""
    opened = LocalIndex(layout.current_version(index))
    results, going = [], threading.Event()

    def read(local_index):
        going.set()
        results.extend(
            len([record for record in local_index.products(range(PRODUCTS)) if record])
            for _ in range(300)
        )

    threads = [threading.Thread(target=read, args=(opened,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    going.wait()
    del opened, threads[:0]
    gc.collect()
    for thread in threads:
        thread.join()
    assert results == [PRODUCTS] * 1200


def test_widening_is_limited(opened, monkeypatch):
    """At most `MAX_WIDENING` times the candidates."""
    from sicot_jax.index.backends import local

    num_ranked = []
    rank_photos = local.rank_photos
    monkeypatch.setattr(
        local,
        "rank_photos",
        lambda features, products, q, rows, counts: (
            num_ranked.append(len(rows)) or rank_photos(features, products, q, rows, counts)
        ),
    )
    monkeypatch.setattr(local, "MAX_WIDENING", 2)
    search(opened, queries(1)[0], PRODUCTS + 3, candidates=5)
    assert max(num_ranked) <= 2 * (PRODUCTS + 3) < PRODUCTS * PHOTOS
