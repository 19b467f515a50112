"""A sharded index against the index that it was split from."""

import contextlib
import dataclasses

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo, sku, write_manifest_csv
from helpers.small_index import PHOTOS, PRODUCTS, WIDTH
from hypothesis import given
from hypothesis import strategies as st

from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.index.backends import sharded
from sicot_jax.index.backends.base import ActiveProducts, Neighbour
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.backends.open import open_index
from sicot_jax.index.backends.sharded import ShardedIndex, shard_folder
from sicot_jax.index.storage import inverted_lists, layout
from sicot_jax.indexing.add import add_products
from sicot_jax.indexing.fit_ranker import fit_index_ranker
from sicot_jax.indexing.nightly import NightlyPaths, run_nightly
from sicot_jax.indexing.parquet import export_index
from sicot_jax.indexing.split import split_index
from sicot_jax.indexing.update import remove_products, update_products
from sicot_jax.indexing.verify import verify_version
from sicot_jax.search.answer import Query, Searcher
from sicot_jax.search.category import read_fusion

ALL = PRODUCTS * PHOTOS + 9  # candidates


@contextlib.contextmanager
def opened(index):
    opened_index = open_index(layout.current_version(index))
    try:
        yield opened_index
    finally:
        opened_index.close()


@pytest.fixture
def changed(index, tmp_path):
    """With an added, a deleted and a recategorised product, and a deleted photo."""
    rows = [
        {"image": f"{n}.jpg", "sku": "new", "category": "fresh", "title": "t", "price": "2"}
        for n in range(3)
    ]
    add_products(
        index,
        write_manifest_csv(
            tmp_path / "feed", rows, {f"{n}.jpg": jpeg(photo(30, n)) for n in range(3)}
        ),
    )
    remove_products(index, [sku(2)], photos=[f"{1:032x}"])
    (tmp_path / "move.csv").write_text(f"sku,category\n{sku(1)},kind 0\n")
    update_products(index, tmp_path / "move.csv")
    return index


def queries(count=10):
    return np.random.default_rng(1).random((count, WIDTH)).astype(np.float32)


def image_ids(opened_index, near):
    """Identifies neighbours by image id, as the rows of the same photo differ."""
    ids = {}
    parts = opened_index.shards if isinstance(opened_index, ShardedIndex) else [opened_index]
    for shard, part in enumerate(parts):
        for row, image_id in part.store.connection.execute("SELECT row, image_id FROM photos"):
            ids[row * len(parts) + shard] = image_id
    # The order of summation of a dot product depends on the neighbouring rows.
    return [(n.product_id, ids[n.row], pytest.approx(n.similarity, abs=1e-6)) for n in near]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shards_answer_as_one_index(changed, tmp_path, count):
    """With more shards than products some are empty."""
    split_index(changed, tmp_path / "split", count)
    assert verify_version(layout.current_version(tmp_path / "split"), checksums=True) == []
    with opened(changed) as unsharded, opened(tmp_path / "split") as sharded_index:
        assert isinstance(sharded_index, ShardedIndex)
        assert len(sharded_index.shards) == count
        for category in (None, "kind 0", "kind 1", "fresh", "nothing"):
            one, other = (
                index.nearest(queries(), 4, num_photos=5, category=category, candidates=ALL)
                for index in (unsharded, sharded_index)
            )
            for unsharded_near, sharded_near in zip(one, other, strict=True):
                for part in ("products", "photos"):
                    assert image_ids(unsharded, getattr(unsharded_near, part)) == image_ids(
                        sharded_index, getattr(sharded_near, part)
                    )
        assert sharded_index.counts() == {
            "products": PRODUCTS,
            "photos": (PRODUCTS - 1) * PHOTOS + 2,
        }
        assert sharded_index.manifest.num_photos == sharded_index.counts()["photos"]
        assert sharded_index.manifest.model_sha256 == unsharded.manifest.model_sha256
        sharded_active, unsharded_active = (
            sharded_index.active_products(),
            unsharded.active_products(),
        )
        for field in ("deleted", "new_products", "kernel", "bias"):
            np.testing.assert_array_equal(
                getattr(sharded_active, field), getattr(unsharded_active, field)
            )
        assert sharded_active.category_names == ("fresh", "kind 0", "kind 1")
        names = [[*one.category_names, None] for one in (sharded_active, unsharded_active)]
        there = [n for n in range(PRODUCTS + 1) if n != 2]
        assert [names[0][n] for n in sharded_active.product_category[there]] == [
            names[1][n] for n in unsharded_active.product_category[there]
        ]


def test_recognition_is_the_same(changed, tmp_path):
    split_index(changed, tmp_path / "split", 3)
    fusion = read_fusion(layout.current_version(tmp_path / "split") / layout.CATEGORY_FUSION)
    with opened(changed) as unsharded, opened(tmp_path / "split") as sharded_index:
        for embedding in queries(5):
            logits = embedding[:PRODUCTS]
            one, other = (
                Searcher(index, category_fusion=fusion).answer(
                    Query(embedding, logits, k=4, num_similar=5)
                )
                for index in (unsharded, sharded_index)
            )
            for part in ("matches", "similar"):
                unsharded_scores, sharded_scores = (
                    [(s.product.sku, pytest.approx(s.score)) for s in getattr(a, part)]
                    for a in (one, other)
                )
                assert unsharded_scores == sharded_scores
                assert len(unsharded_scores) >= 3
            assert one.searched_category == other.searched_category
            assert dict(one.category.top) == pytest.approx(dict(other.category.top))


def test_records_and_pictures_are_read_from_their_shards(changed, tmp_path):
    split_index(changed, tmp_path / "split", 2)
    with opened(changed) as unsharded, opened(tmp_path / "split") as sharded_index:
        numbers = [6, 0, 2, 3, 0]
        for one, other in zip(
            unsharded.products(numbers), sharded_index.products(numbers), strict=True
        ):
            if one is None:
                assert other is None
                continue
            assert dataclasses.replace(one, picture_rows=[]) == dataclasses.replace(
                other, picture_rows=[]
            )
            assert (
                [unsharded.picture(p) for p in one.picture_rows]
                == [sharded_index.picture(p) for p in other.picture_rows]
                != []
            )
            assert sharded_index.product(one.sku) == other
            assert sharded_index.count_photos(one.product_id) == unsharded.count_photos(
                one.product_id
            )
        assert sharded_index.product("nobody") is None
        assert sharded_index.product(sku(2)) is None
        assert sharded_index.picture(10_000) is None


def test_few_candidates_are_at_least_as_good(changed, tmp_path):
    """Each shard ranks as many candidates as one index would."""
    split_index(changed, tmp_path / "split", 3)
    with opened(changed) as unsharded, opened(tmp_path / "split") as sharded_index:
        for one, other in zip(
            *(
                index.nearest(queries(), 2, num_photos=3, candidates=4)
                for index in (unsharded, sharded_index)
            ),
            strict=True,
        ):
            for part in ("products", "photos"):
                unsharded_similarities, sharded_similarities = (
                    [n.similarity for n in getattr(near, part)] for near in (one, other)
                )
                assert all(
                    b >= a - 1e-6
                    for a, b in zip(unsharded_similarities, sharded_similarities, strict=True)
                )


def test_fitted_files_are_copied(index, tmp_path, monkeypatch):
    """Optional ones too."""
    folder = layout.current_version(index)
    (folder / "ranker.txt").write_text("trees")
    monkeypatch.setattr(layout, "FITTED", (*layout.FITTED, "ranker.txt", "ranker.json"))
    split_index(index, tmp_path / "split", 2)
    version = layout.current_version(tmp_path / "split")
    for part in (version, *(shard_folder(version, shard) for shard in range(2))):
        assert (part / "ranker.txt").read_text() == "trees"
        assert not (part / "ranker.json").exists()
        for name in (
            "binary_encoder.npz",
            "imprint.npz",
            "title_regression.npz",
            "rejection.json",
            "category_fusion.json",
        ):
            assert (part / name).read_bytes() == (folder / name).read_bytes()


def test_shard_is_an_index_with_lists(index, tmp_path, monkeypatch):
    monkeypatch.setattr(inverted_lists, "MIN_ROWS", 5)
    monkeypatch.setattr(inverted_lists, "ROWS_PER_LIST", 3)
    split_index(index, tmp_path / "split", 2)
    version = layout.current_version(tmp_path / "split")
    assert verify_version(version, checksums=True) == []
    with contextlib.closing(open_index(shard_folder(version, 1))) as part:
        assert part._lists is not None
        assert {n.product_id for n in part.nearest(queries(1), 9)[0].products} == {1, 3, 5}


def test_damaged_shard_is_detected(index, tmp_path):
    split_index(index, tmp_path / "split", 2)
    version = layout.current_version(tmp_path / "split")
    codes = shard_folder(version, 1) / layout.CODES
    codes.write_bytes(bytes(codes.stat().st_size))
    assert all(
        fault.startswith("shard-1: codes.u8: ") for fault in verify_version(version, checksums=True)
    )
    assert verify_version(version)
    codes.unlink()
    with pytest.raises(InputError, match="0 rows, wanted 12; the index is damaged"):
        open_index(version)


def test_sharded_index_cannot_be_changed(index, tmp_path, capsys):
    out = tmp_path / "split"
    assert (
        cli.main(["index", "split", "--index", str(index), "--out", str(out), "--shards", "2"]) == 0
    )
    assert "2 shards; sicot serve --index" in capsys.readouterr().out
    assert cli.main(["index", "verify", "--index", str(out)]) == 0
    for call in (
        lambda: remove_products(out, [sku(1)]),
        lambda: add_products(out, tmp_path),
        lambda: export_index(out, tmp_path / "export"),
        lambda: split_index(out, tmp_path / "again", 2),
        lambda: fit_index_ranker(out, [tmp_path / "events.sqlite"], tmp_path),
        lambda: LocalIndex(layout.current_version(out)),
        lambda: run_nightly(
            NightlyPaths(tmp_path / "m.csv", tmp_path / "c", tmp_path / "run", out)
        ),
    ):
        with pytest.raises(
            InputError,
            match="is split into 2 shards; change the index that it was split from, and split",
        ):
            call()
    for wrong, why in (
        (["--out", str(out)], "exists"),
        (["--out", str(tmp_path / "x"), "--shards", "1"], "wanted 2"),
    ):
        assert cli.main(["index", "split", "--index", str(index), "--shards", "2", *wrong]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_active_products_by_hand():
    """Products 0 and 2 are of the first shard, 1 and 3 of the second; 3 and 4 are new."""

    def part(deleted, products, names, category):
        rows = np.full((len(products), 2), 7.0, np.float32) * (np.array(products)[:, None] + 1)
        return ActiveProducts(
            np.array(deleted),
            np.array(products, int),
            rows,
            rows[:, 0],
            names,
            np.array(category),
        )

    # A part knows no category of products that it lacks: there it stores its number of categories.
    merged = sharded._merge_active(
        [part([2], [4], ("b",), [0, 1, 1, 1, 0]), part([1], [3], ("a", "c"), [2, 2, 2, 1])]
    )
    assert merged.deleted.tolist() == [1, 2]
    assert merged.new_products.tolist() == [3, 4]
    assert merged.kernel.tolist() == [[28, 28], [35, 35]]
    assert merged.bias.tolist() == [28, 35]
    assert merged.category_names == ("a", "b", "c")
    assert merged.product_category.tolist() == [1, 3, 3, 2, 1]


def test_refresh_sees_changes_of_a_shard(index, tmp_path):
    split_index(index, tmp_path / "split", 2)
    version = layout.current_version(tmp_path / "split")
    with opened(tmp_path / "split") as sharded_index:
        from sicot_jax.index.storage.products import ProductStore

        with (
            contextlib.closing(
                ProductStore(shard_folder(version, 1) / layout.PRODUCTS, writable=True)
            ) as store,
            store.transaction(),
        ):
            store.connection.execute("UPDATE products SET deleted = 1 WHERE product_id = 3")
        assert sharded_index.refresh()
        assert not sharded_index.refresh()
        assert sharded_index.active_products().deleted.tolist() == [3]
        assert {n.product_id for n in sharded_index.nearest(queries(1), 9)[0].products} == set(
            range(PRODUCTS)
        ) - {3}


@given(
    st.integers(1, 5),
    st.dictionaries(st.integers(0, 60), st.sampled_from((-0.5, 0.0, 0.25, 0.5, 1.0)), max_size=40),
    st.integers(0, 12),
)
def test_merged_shards_are_one_list(count, similarities, k):
    """Also where photos are equally similar: then the lower row comes first."""
    rows = [Neighbour(row % 7, row, similarity) for row, similarity in similarities.items()]
    best_first = sorted(rows, key=lambda neighbour: (-neighbour.similarity, neighbour.row))
    by_shard = [
        [
            dataclasses.replace(neighbour, row=neighbour.row // count)
            for neighbour in best_first
            if neighbour.row % count == shard
        ][:k]
        for shard in range(count)
    ]
    index = object.__new__(ShardedIndex)  # merging reads the number of shards alone
    index.shards = by_shard
    assert index._merge(by_shard, k) == best_first[:k]
