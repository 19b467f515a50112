"""An index as Parquet and back."""

import contextlib
import shutil

import numpy as np
import pyarrow as pa
import pytest
from helpers.made_photos import jpeg, photo, sku, write_manifest_csv
from helpers.small_index import BITS, PHOTOS, PRODUCTS, WIDTH
from pyarrow import parquet

from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.indexing import parquet as index_parquet
from sicot_jax.indexing.add import add_products
from sicot_jax.indexing.update import remove_products, update_products
from sicot_jax.indexing.verify import verify_version
from sicot_jax.search.ranking_features import image_sharpness


@pytest.fixture
def changed(index, tmp_path):
    """An index with a deleted product, a new one, and a price."""
    remove_products(index, [sku(2)])
    photos = {f"{n}.jpg": jpeg(photo(8, n)) for n in range(2)}
    rows = [{"image": name, "sku": "new", "category": "kind 0"} for name in photos]
    add_products(index, write_manifest_csv(tmp_path / "feed", rows, photos))
    (tmp_path / "prices.csv").write_text("sku,price\nsku-1,9.5\n")
    update_products(index, tmp_path / "prices.csv")
    return index


def search(index, k=PRODUCTS, **more):
    """SKU and similarity of what is near to some queries, and the rows of later products by SKU."""
    opened = LocalIndex(layout.current_version(index))
    queries = np.random.default_rng(0).random((5, WIDTH)).astype(np.float32)
    near = [
        [(opened.products([n.product_id])[0].sku, round(n.similarity, 3)) for n in hits.products]
        for hits in opened.nearest(queries, k, **more)
    ]
    rows = {
        opened.products([int(number)])[0].sku: row
        for number, row in zip(
            opened.active_products().new_products, opened.active_products().kernel, strict=True
        )
    }
    opened.close()
    return near, rows


def test_export_and_import(changed, tmp_path, capsys):
    """The same results and class weights; deleted products are not exported."""
    assert (
        cli.main(["index", "export", "--index", str(changed), "--out", str(tmp_path / "out")]) == 0
    )
    assert f"{PRODUCTS} products, {(PRODUCTS - 1) * PHOTOS + 2} photos" in capsys.readouterr().out
    assert (
        cli.main(["index", "import", "--index", str(tmp_path / "other"), str(tmp_path / "out")])
        == 0
    )
    version = layout.current_version(tmp_path / "other")
    assert verify_version(version, checksums=True) == []
    for category in (None, "kind 0", "kind 1"):
        (near, rows), (near_before, rows_before) = (
            search(i, category=category) for i in (tmp_path / "other", changed)
        )
        assert near == near_before
        np.testing.assert_allclose(rows["new"], rows_before["new"], rtol=1e-5)
    manifest = layout.read_index_manifest(version)
    assert sorted(manifest.category_ranges) == ["kind 0", "kind 1"]
    assert (
        sum(last - first for first, last in manifest.category_ranges.values())
        == manifest.num_photos
    )
    opened = LocalIndex(version)
    assert opened.product(sku(1)).quality["price"] == 9.5
    with contextlib.closing(LocalIndex(layout.current_version(changed))) as original:
        assert opened.product(sku(1)).quality == original.product(sku(1)).quality
    assert opened.product(sku(2)) is None
    assert opened.product("new").quality == {"sharpness": image_sharpness(jpeg(photo(8, 0)))}
    assert opened.active_products().deleted.tolist() == [2]  # the model still knows it
    assert opened.picture(opened.product("new").picture_rows[0]) == jpeg(photo(8, 0))
    opened.close()


def test_imports_that_change_most_products_stop(changed, tmp_path, capsys):
    index_parquet.export_index(changed, tmp_path / "out")
    path = tmp_path / "out" / index_parquet.PRODUCTS
    table = parquet.read_table(path)
    titles = pa.array(["another thing"] * len(table))
    parquet.write_table(table.set_column(table.column_names.index("title"), "title", titles), path)
    command = ["index", "import", "--index", str(changed), str(tmp_path / "out")]
    before = layout.current_version(changed)
    assert cli.main(command) == cli.INPUT_ERROR
    assert "products would be renamed" in capsys.readouterr().err
    assert layout.current_version(changed) == before
    assert cli.main([*command, "--max-change-share", "1"]) == 0


def test_exported_columns(changed, tmp_path):
    """Plain columns: embeddings of length 1 and their codes."""
    index_parquet.export_index(changed, tmp_path / "out")
    photos = parquet.read_table(tmp_path / "out" / index_parquet.PHOTOS)
    assert photos.column_names == ["sku", "image_id", "embedding", "code", "picture"]
    embeddings = np.array(photos["embedding"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3)
    assert {len(code) for code in photos["code"].to_pylist()} == {BITS // 8}
    products = parquet.read_table(tmp_path / "out" / index_parquet.PRODUCTS).to_pydict()
    assert products["price"][products["sku"].index(sku(1))] == 9.5
    assert products["sales"] == [None] * PRODUCTS


def test_damaged_export_leaves_the_index(changed, tmp_path, capsys):
    index_parquet.export_index(changed, tmp_path / "out")
    with pytest.raises(InputError, match="exists; give another --out"):
        index_parquet.export_index(changed, tmp_path / "out")
    before = layout.current_version(changed)

    def refused(said):
        assert (
            cli.main(["index", "import", "--index", str(changed), str(tmp_path / "bad")])
            == cli.INPUT_ERROR
        )
        err = capsys.readouterr().err
        assert said in err, err
        assert len(err.splitlines()) == 1, err
        assert layout.current_version(changed) == before
        assert verify_version(before) == []
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)

    refused("wanted the manifest of a product index")
    for name in (index_parquet.PRODUCTS, index_parquet.PHOTOS):
        for damage in ("cut", "gone"):
            shutil.copytree(tmp_path / "out", tmp_path / "bad")
            data = (tmp_path / "bad" / name).read_bytes()
            (tmp_path / "bad" / name).unlink()
            if damage == "cut":
                (tmp_path / "bad" / name).write_bytes(data[: len(data) // 2])
            refused("wanted a file of `sicot index export`")
    shutil.copytree(tmp_path / "out", tmp_path / "bad")
    table = parquet.read_table(tmp_path / "bad" / index_parquet.PRODUCTS)
    parquet.write_table(table.slice(1), tmp_path / "bad" / index_parquet.PRODUCTS)
    refused("which is not in products.parquet")
    shutil.copytree(tmp_path / "out", tmp_path / "bad")
    (tmp_path / "bad" / "model" / "model.safetensors").write_bytes(b"x")
    refused("its sha256 does not match")
