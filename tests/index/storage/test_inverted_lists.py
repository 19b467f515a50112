"""Inverted lists of vectors in the plane whose neighbours are known, and an index with lists."""

import contextlib
import dataclasses

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo, write_manifest_csv
from helpers.small_index import PHOTOS, PRODUCTS, WIDTH, publish_copy

from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import inverted_lists, layout
from sicot_jax.index.storage.inverted_lists import InvertedLists, write_inverted_lists
from sicot_jax.indexing.add import add_products
from sicot_jax.indexing.parquet import export_index, import_index
from sicot_jax.indexing.update import remove_products, update_products
from sicot_jax.indexing.verify import verify_version

# Angles of the rows of two categories, 0 to 5 and 6 to 11; each category has two clusters of three.
ANGLES = np.array([0, 90, 2, 92, 4, 94, 45, 135, 47, 137, 49, 139])


def plane(degrees):
    radians = np.deg2rad(np.asarray(degrees, np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], -1).astype(np.float32)


@pytest.fixture
def plane_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(inverted_lists, "ROWS_PER_LIST", 3)
    write_inverted_lists(tmp_path, plane(ANGLES).astype(np.float16), [(6, 12), (0, 6)])
    return InvertedLists(tmp_path, 12, 2)


def test_list_is_a_cluster(plane_lists):
    """The nearest list of each cluster has its rows, ascending; centroids are the cluster means."""
    for degrees, rows in ((1, [0, 2, 4]), (91, [1, 3, 5]), (46, [6, 8, 10]), (140, [7, 9, 11])):
        assert plane_lists.probe(plane(degrees), 0, 12, 3).tolist() == rows
    np.testing.assert_allclose(
        sorted(plane_lists._centroids[:, 0]), sorted(plane([2, 92, 47, 137])[:, 0]), atol=1e-3
    )


def test_probes_enough_lists(plane_lists):
    """From 20 degrees the centroids at 2, 47, 92 and 137 are 18, 27, 72 and 117 away."""
    probed = [
        plane_lists.probe(plane(20), 0, 12, wanted).tolist() for wanted in (1, 3, 4, 7, 12, 99)
    ]
    in_order = [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    assert probed == [in_order[:n] for n in (3, 3, 6, 9, 12, 12)]


def test_probes_lists_of_the_category_alone(plane_lists):
    assert plane_lists.probe(plane(1), 6, 12, 3).tolist() == [6, 8, 10]
    assert plane_lists.probe(plane(46), 0, 6, 3).tolist() in ([0, 2, 4], [1, 3, 5])
    assert sorted(plane_lists.probe(plane(46), 0, 6, 6).tolist()) == list(range(6))


def test_damaged_lists_are_detected(plane_lists, tmp_path):
    assert plane_lists.find_faults([(0, 6), (6, 12)]) == []
    assert "span categories" in plane_lists.find_faults([(0, 5), (5, 12)])[0]
    with pytest.raises(
        InputError,
        match=r"posting_lists.i32: 12 rows in 4 lists of 2 numbers, wanted 13 of 2; build the",
    ):
        InvertedLists(tmp_path, 13, 2)
    stored = np.fromfile(tmp_path / layout.POSTING_LISTS, np.int32)
    stored[5] = stored[6]  # a row twice, another one lost
    stored.tofile(tmp_path / layout.POSTING_LISTS)
    assert (
        "rows 0 to 6 are not each in one list"
        in InvertedLists(tmp_path, 12, 2).find_faults([(0, 6), (6, 12)])[0]
    )
    (tmp_path / layout.CENTROIDS).write_bytes(b"nothing")
    with pytest.raises(
        InputError,
        match=r"centroids.faiss: no inverted lists \(RuntimeError\); build the index again",
    ):
        InvertedLists(tmp_path, 12, 2)
    (tmp_path / layout.CENTROIDS).unlink()
    with pytest.raises(InputError, match="no inverted lists"):
        InvertedLists(tmp_path, 12, 2)


@pytest.fixture
def listed(index, monkeypatch):
    """The version in use with lists of about three rows, probed from two candidates on."""
    monkeypatch.setattr(inverted_lists, "ROWS_PER_LIST", 3)
    monkeypatch.setattr(inverted_lists, "PROBE_FACTOR", 3)
    monkeypatch.setattr(inverted_lists, "MIN_ROWS", 12)
    folder = layout.current_version(index)
    manifest = layout.read_index_manifest(folder)
    with contextlib.closing(LocalIndex(folder)) as flat:
        write_inverted_lists(
            folder, flat._snapshot.features, [(a, b) for a, b in manifest.category_ranges.values()]
        )
    layout.write_index_manifest(
        folder, dataclasses.replace(manifest, sha256=layout.file_digests(folder))
    )
    return folder


@contextlib.contextmanager
def opened(folder):
    local_index = LocalIndex(folder)
    try:
        yield local_index
    finally:
        local_index.close()


def queries(count=10):
    return np.random.default_rng(1).random((count, WIDTH)).astype(np.float32)


def test_proposes_the_nearest_rows_of_probed_lists(index, listed):
    """Nearest by code among the probed rows; rows added after the build are always compared."""
    manifest_rows = [
        {"image": f"{n}.jpg", "sku": "new", "category": "kind 1", "title": "t"} for n in range(2)
    ]
    add_products(
        index,
        write_manifest_csv(
            index.parent / "feed", manifest_rows, {f"{n}.jpg": jpeg(photo(30, n)) for n in range(2)}
        ),
    )
    built = PRODUCTS * PHOTOS
    with opened(listed) as local_index:
        snapshot = local_index._snapshot
        for query in l2_normalize(queries()):
            code = local_index.encoder.encode(query[None])[0]
            rows = np.append(local_index._lists.probe(query, 0, built, 6), [built, built + 1])
            assert len(rows) < len(snapshot.codes)
            all_distances = np.unpackbits(snapshot.codes[rows] ^ code, axis=1).sum(1)
            proposed = local_index._propose(snapshot, query, code, (0, len(snapshot.codes)), 2)
            distances = np.unpackbits(snapshot.codes[proposed] ^ code, axis=1).sum(1)
            assert set(proposed) <= set(rows)
            assert distances.tolist() == np.sort(all_distances)[:2].tolist()
        # An added photo is nearest to itself, in all categories and in its category.
        feature = np.asarray(snapshot.features[built], np.float32)
        for category in (None, "kind 1"):
            near = local_index.nearest(
                feature[None], 1, num_photos=1, category=category, candidates=2
            )[0]
            assert near.photos[0].row == built
            assert near.products[0].product_id == PRODUCTS


def test_deleted_and_recategorized_photos_with_lists(listed, index, tmp_path):
    """Deleted photos are never returned, and all other products are."""
    remove_products(index, ["sku-2"])
    remove_products(index, [], photos=[f"{0:032x}"])
    (tmp_path / "move.csv").write_text("sku,category\nsku-1,kind 0\n")
    update_products(index, tmp_path / "move.csv")
    with opened(listed) as local_index:
        flat = LocalIndex(listed)
        flat._lists = None
        for category, k in ((None, 3), ("kind 0", 3), ("kind 1", 2)):
            for candidates in (2, 4):  # three rows for each: of 12 in a category, of 24 in all
                narrow = local_index.nearest(
                    queries(), 3, num_photos=4, category=category, candidates=candidates
                )
                wide = flat.nearest(queries(), 3, num_photos=4, category=category, candidates=99)
                for near, exact in zip(narrow, wide, strict=True):
                    assert 2 not in {n.product_id for n in near.products}
                    assert 0 not in {n.row for n in near.photos}
                    assert len(near.products) == k
                    best = zip(near.products, exact.products, strict=True)
                    assert all(
                        distances.similarity <= other.similarity + 1e-6 for distances, other in best
                    )
        flat.close()


def test_verify_and_open_detect_damaged_lists(index, listed):
    assert verify_version(listed, checksums=True) == []
    stored = np.fromfile(listed / layout.POSTING_LISTS, np.int32)
    stored[-1] = stored[-2]
    stored.tofile(listed / layout.POSTING_LISTS)
    assert [fault.split(":")[0] for fault in verify_version(listed, checksums=True)] == [
        layout.POSTING_LISTS,
        layout.POSTING_LISTS,
    ]
    stored[:-1].tofile(listed / layout.POSTING_LISTS)
    assert "23 rows in 8 lists" in verify_version(listed)[0]
    with pytest.raises(InputError, match=r"23 rows in 8 lists .* build the index again"):
        LocalIndex(listed)


def test_import_writes_lists_anew(index, listed, tmp_path, monkeypatch):
    """Rows are reordered, so the lists of the exported index do not apply."""
    remove_products(index, ["sku-2"])
    export_index(index, tmp_path / "out")
    assert not (tmp_path / "out" / layout.POSTING_LISTS).exists()
    monkeypatch.setattr(inverted_lists, "MIN_ROWS", 10)
    folder = import_index(tmp_path / "out", tmp_path / "other")
    assert {layout.POSTING_LISTS, layout.CENTROIDS} <= set(
        layout.read_index_manifest(folder).sha256
    )
    assert verify_version(folder, checksums=True) == []
    with opened(folder) as local_index:
        assert len(local_index._lists._rows) == (PRODUCTS - 1) * PHOTOS


def test_small_index_has_no_lists(index, small_version):
    folder = publish_copy(index, small_version)
    assert not (folder / layout.POSTING_LISTS).exists()
    with opened(folder) as local_index:
        assert local_index._lists is None
