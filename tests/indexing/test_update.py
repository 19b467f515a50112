"""Adding, updating and deleting products of the version in use."""

import contextlib
import json

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo, sku, write_manifest_csv
from helpers.small_index import PHOTOS, PRODUCTS, WIDTH

from sicot_jax.cli import main as cli
from sicot_jax.errors import InputError
from sicot_jax.index.backends.local import LocalIndex
from sicot_jax.index.storage import layout
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing import add
from sicot_jax.indexing.add import add_products, open_index_engine
from sicot_jax.indexing.title_regression import load_title_regression
from sicot_jax.indexing.update import read_sku_list, remove_products, update_products
from sicot_jax.indexing.verify import verify_version
from sicot_jax.search.answer import Query, Searcher

NEW = PRODUCTS + 1  # a colour that no product has


def feed(folder, products, photos=2, **more):
    """A manifest of some photos of each product."""
    names = {f"{p}_{n}.png": jpeg(photo(p, 50 + n), "PNG") for p in products for n in range(photos)}
    rows = [{"image": name, "sku": sku(int(name.partition("_")[0])), **more} for name in names]
    return write_manifest_csv(folder, rows, names)


def counts_of(index):
    store = ProductStore(layout.current_version(index) / layout.PRODUCTS)
    counts = store.counts()
    store.close()
    return counts


def shop_numbers(record):
    """Quality numbers of a record that the shop provides; the sharpness is computed."""
    assert record.quality["sharpness"] > 0
    return {name: value for name, value in record.quality.items() if name != "sharpness"}


def faults(index):
    return verify_version(layout.current_version(index))


def test_new_product_is_returned_and_has_class_weights(index, tmp_path):
    """From two photos and a title: mean row + r unit(d), d = (2 (m - g) + t / 2) / 2.5."""
    report = add_products(
        index, feed(tmp_path / "feed", [NEW], title="a new thing", category="kind 1")
    )
    assert (report.new_products, report.new_photos, report.dropped) == (1, 2, [])
    assert faults(index) == []
    opened = LocalIndex(layout.current_version(index))
    engine = open_index_engine(opened.folder)
    embedding, logits, _ = next(engine(photo(NEW, 77)[None]).per_photo())
    answer = Searcher(opened).answer(
        Query(embedding, logits, k=PRODUCTS + 1, num_similar=1, category="kind 1")
    )
    assert answer.similar[0].product.title == "a new thing"
    assert "a new thing" in [match.product.title for match in answer.matches]
    with np.load(opened.folder / layout.IMPRINT) as stored:
        features = np.asarray(
            opened._snapshot.features[-2:], np.float32
        )  # their length is 1 to what float16 holds
        photo_direction = (features / np.linalg.norm(features, axis=1, keepdims=True)).mean(
            0
        ) - stored["center"]
        title_direction = load_title_regression(opened.folder / layout.TITLE_REGRESSION).predict(
            [("a new thing", "kind 1")]
        )[0]
        assert np.linalg.norm(title_direction) > 0.01
        towards = (2 * photo_direction + title_direction / 2) / 2.5
        row = stored["mean_row"] + stored["scale"] * towards / np.linalg.norm(towards)
        assert stored["scale"] > 0
    np.testing.assert_allclose(opened.active_products().kernel, [row], rtol=1e-5)
    assert opened.active_products().new_products.tolist() == [PRODUCTS]
    known, logits, _ = next(engine(photo(0, 77)[None]).per_photo())
    assert Searcher(opened).answer(Query(known, logits, k=1, num_similar=0)).matches[
        0
    ].product.sku == sku(0)
    opened.close()


def test_adding_again_changes_nothing(index, tmp_path):
    source = feed(tmp_path / "feed", [0, NEW])
    add_products(index, source)
    before = counts_of(index)
    again = add_products(index, source)
    assert (again.new_products, again.new_photos, again.known_photos) == (0, 0, 4)
    assert counts_of(index) == before == {"products": PRODUCTS + 1, "photos": PRODUCTS * PHOTOS + 4}


def test_more_photos_keep_the_record(index, tmp_path):
    """Texts that the manifest leaves empty stay, others are replaced."""
    add_products(index, feed(tmp_path / "feed", [1], tags="new tag"))
    store = ProductStore(layout.current_version(index) / layout.PRODUCTS)
    product = store.product(sku(1))
    assert (product.title, product.tags, product.category) == (
        f"title {sku(1)}",
        "new tag",
        "kind 1",
    )
    assert store.count_photos(product.product_id) == PHOTOS + 2
    assert len(product.picture_rows) == PHOTOS
    store.close()


def test_deleted_product_is_restored_with_its_photos(index, tmp_path):
    assert remove_products(index, [sku(2)]) == 1
    assert counts_of(index)["products"] == PRODUCTS - 1
    assert remove_products(index, [sku(2)]) == 0
    add_products(index, feed(tmp_path / "feed", [2], photos=1))
    assert counts_of(index)["products"] == PRODUCTS
    opened = LocalIndex(layout.current_version(index))
    assert opened.count_photos(opened.product(sku(2)).product_id) == PHOTOS + 1
    opened.close()


def test_unusable_rows_are_reported_and_others_added(index, tmp_path, capsys):
    source = write_manifest_csv(
        tmp_path / "feed",
        [
            {"image": "good.jpg", "sku": "x"},
            {"image": "broken.jpg", "sku": "x"},
            {"image": "missing.jpg", "sku": "y"},
            {"image": "good.jpg", "sku": ""},
        ],
        {"good.jpg": jpeg(photo(NEW)), "broken.jpg": b"\xff\xd8\xff nothing"},
    )
    assert cli.main(["index", "add", "--index", str(index), str(source)]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == "1 products and 1 photos new, 3 rows dropped"
    assert len(err.splitlines()) == 3
    assert "broken.jpg: not a photo" in err
    assert "missing.jpg: photo missing" in err
    assert faults(index) == []
    assert counts_of(index)["products"] == PRODUCTS + 1


def test_what_an_addition_does_not_read_is_named(index, tmp_path, capsys):
    """As an import does: columns, other files, texts with HTML and doubtful SKUs."""
    names = {"a.jpg": jpeg(photo(NEW))}
    row = {"image": "a.jpg", "sku": "NA", "titel": "x", "price": "9.99", "tags": "<b>x</b>"}
    source = write_manifest_csv(tmp_path / "feed", [{**row, "split": "test"}], names)
    assert cli.main(["index", "add", "--index", str(index), str(source)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 products and 1 photos new",
        "unused columns: titel (did you mean title?), price, split",
        "HTML turned into text: 1 row, such as '<b>x</b>'",
        "WARNING: SKUs that may stand for a missing one: 'NA'; check the source",
    ]
    folder = tmp_path / "folders" / "shoe"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(jpeg(photo(NEW)))
    (folder / "notes.txt").write_text("x")
    assert list(add_products(index, tmp_path / "folders").left_out.values()) == [1]


@pytest.mark.parametrize("written", ["Stu\u0308hle\u00a01", "\u3000St\u00fchle 1"])
def test_a_sku_is_found_however_it_is_written(index, tmp_path, capsys, written):
    """Other Unicode forms and kinds of blanks, in additions, updates and lists of SKUs."""
    add_products(index, feed(tmp_path / "feed", [NEW], sku="St\u00fchle 1"))
    (tmp_path / "u.csv").write_text(f"sku, title\n{written},new &amp; <i>fine</i>\n")
    assert update_products(index, tmp_path / "u.csv") == 1
    store = ProductStore(layout.current_version(index) / layout.PRODUCTS)
    assert store.product("St\u00fchle 1").title == "new & fine"
    store.close()
    (tmp_path / "r.txt").write_bytes(b"\xef\xbb\xbf" + f"{written}\r\n\r\n".encode())
    command = ["index", "remove", "--index", str(index), "--file", str(tmp_path / "r.txt")]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.endswith("1 deleted\n")


def test_a_list_of_skus_that_cannot_be_read(index, tmp_path, capsys):
    command = ["index", "remove", "--index", str(index), "--file", str(tmp_path / "r.txt")]
    assert cli.main(command) == cli.INPUT_ERROR
    assert "wanted a file with a SKU per line" in capsys.readouterr().err
    (tmp_path / "r.txt").write_bytes(b"sku-0\nGr\xfcn\n")
    assert cli.main(command) == cli.INPUT_ERROR
    assert "r.txt is not UTF-8 (line 2); save it again as UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            ["sku,price", "sku-0,0", "sku-1,0.00", "sku-2,0"],
            "3 of 6 products would get the price 0, such as",
        ),
        (["sku,title", "sku-0,x", "sku-1,y", "sku-2,z"], "3 of 6 products would be renamed"),
    ],
)
def test_mass_updates_stop(index, tmp_path, capsys, rows, said):
    """At most a fifth of the products at once, or a few; a flag goes on."""
    path = tmp_path / "u.csv"
    path.write_text("\n".join(rows) + "\n")
    command = ["index", "update", "--index", str(index), str(path)]
    assert cli.main(command) == cli.INPUT_ERROR
    error = capsys.readouterr().err
    assert said in error
    assert "give --max-change-share 1 once if this is right" in error
    path.write_text("\n".join(rows[:3]) + "\n")
    assert cli.main(command) == 0
    path.write_text("\n".join(rows) + "\n")
    assert cli.main([*command, "--max-change-share", "1"]) == 0
    path.write_text("sku\n")
    assert update_products(index, path) == 0


def test_mass_removals_stop(index, tmp_path, capsys):
    """Those of a file; what is typed is meant."""
    skus = ["sku-0", "sku-1", "sku-2"]
    (tmp_path / "gone.txt").write_text("\n".join(skus))
    command = ["index", "remove", "--index", str(index), "--file", str(tmp_path / "gone.txt")]
    assert cli.main(command) == cli.INPUT_ERROR
    assert "3 of 6 products would be withdrawn" in capsys.readouterr().err
    assert counts_of(index)["products"] == PRODUCTS
    assert cli.main([*command, "--max-change-share", "0.5"]) == 0
    assert counts_of(index)["products"] == PRODUCTS - 3
    typed = ["index", "remove", "--index", str(index), "sku-3", "sku-4"]
    assert cli.main(typed) == 0
    assert counts_of(index)["products"] == PRODUCTS - 5


@pytest.mark.parametrize(
    "text",
    [
        "sku-0\nsku-1\n",
        '"sku-0"\n"sku-1"\n',
        "SKU\r\nsku-0\r\n\r\nsku-1\r\n",
        "title;sku;\nx;sku-0;\ny;sku-1;\n",
        '\ufeffsku,title\n"sku-0","a, b"\nsku-1,c\n',
    ],
)
def test_lists_of_skus(tmp_path, text):
    (tmp_path / "gone").write_text(text, encoding="utf-8")
    assert read_sku_list(tmp_path / "gone") == ["sku-0", "sku-1"]


def test_additions_that_rename_most_products_stop(index, tmp_path, capsys):
    path = feed(tmp_path / "feed", range(4), photos=1, title="another thing")
    command = ["index", "add", "--index", str(index), str(path)]
    assert cli.main(command) == cli.INPUT_ERROR
    assert "4 of 6 products would be renamed" in capsys.readouterr().err
    assert cli.main([*command, "--max-change-share=1"]) == 0


def test_updates_from_other_tables(index, tmp_path):
    (tmp_path / "u.json").write_text('[{"sku": "sku-0", "price": 2.5}]')
    assert update_products(index, tmp_path / "u.json") == 1
    store = ProductStore(layout.current_version(index) / layout.PRODUCTS)
    assert shop_numbers(store.products([0])[0]) == {"price": 2.5}
    store.close()


def test_manifest_without_usable_rows_fails(index, tmp_path, capsys):
    source = write_manifest_csv(tmp_path / "feed", [{"image": "a.jpg", "sku": "x"}], {})
    assert cli.main(["index", "add", "--index", str(index), str(source)]) == cli.INPUT_ERROR
    assert "no row can be used, such as a.jpg: photo missing" in capsys.readouterr().err
    assert counts_of(index)["products"] == PRODUCTS


def test_folder_per_sku(index, tmp_path):
    (tmp_path / "feed" / "shoe").mkdir(parents=True)
    (tmp_path / "feed" / "shoe" / "1.jpg").write_bytes(jpeg(photo(NEW)))
    assert add_products(index, tmp_path / "feed").new_products == 1


@pytest.mark.parametrize(
    "after", [layout.FEATURES, layout.CODES, layout.ROW_PRODUCTS, "the product store"]
)
def test_stopped_addition_changes_nothing(index, tmp_path, monkeypatch, after):
    """Stopped after each file was written, and inside the transaction; then given again."""
    source, version = feed(tmp_path / "feed", [1, NEW]), layout.current_version(index)

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        if after == "the product store":
            patch.setattr(add, "set_num_rows", lambda *_: (_ for _ in ()).throw(Killed))
        else:
            write = VectorFiles.write_rows

            def stopping(self, name, at, rows):
                write(self, name, at, rows)
                if name == after:
                    raise Killed

            patch.setattr(VectorFiles, "write_rows", stopping)
        with pytest.raises(Killed):
            add_products(index, source)
    assert verify_version(version, checksums=True) == []
    assert counts_of(index) == {"products": PRODUCTS, "photos": PRODUCTS * PHOTOS}
    assert add_products(index, source).new_photos == 4
    assert verify_version(version, checksums=True) == []


def test_single_photo_is_deleted(index):
    """The photo is not returned any more; its product is."""
    version = layout.current_version(index)
    store = ProductStore(version / layout.PRODUCTS)
    (image_id,) = store.connection.execute("SELECT image_id FROM photos WHERE row = 0").fetchone()
    product = store.connection.execute("SELECT product_id FROM photos WHERE row = 0").fetchone()[0]
    assert remove_products(index, [], photos=[image_id]) == 1
    assert store.count_photos(product) == 3
    assert 0 not in store.products([product])[0].picture_rows
    store.close()
    opened = LocalIndex(version)
    feature = np.asarray(opened._snapshot.features[0], np.float32)
    assert 0 not in [n.row for n in opened.nearest(feature[None], PRODUCTS)[0].products]
    opened.close()


@pytest.mark.parametrize(
    ("skus", "photos", "message"),
    [(["sku-0", "nope"], [], "no product 'nope'"), (["sku-0"], ["00"], "no photo '00'")],
)
def test_removing_unknown_products_changes_nothing(index, skus, photos, message):
    with pytest.raises(InputError, match=message):
        remove_products(index, skus, photos=photos)
    assert counts_of(index)["products"] == PRODUCTS


def test_records_are_updated(index, tmp_path, capsys):
    path = tmp_path / "prices.csv"
    path.write_text("sku,title,price,sales\nsku-0,new title,9.5,\nsku-1,,,12\n")
    assert cli.main(["index", "update", "--index", str(index), str(path)]) == 0
    path.write_text("sku,rating\nsku-0,4\n")
    assert update_products(index, path) == 1
    store = ProductStore(layout.current_version(index) / layout.PRODUCTS)
    first, second = store.products([0, 1])
    assert (first.title, shop_numbers(first)) == ("new title", {"price": 9.5, "rating": 4.0})
    assert (second.title, shop_numbers(second)) == ("title sku-1", {"sales": 12.0})
    store.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title\nx\n", "no column sku"),
        ("sku,colour\nsku-0,red\n", "a column 'colour', wanted sku and some of title, tags"),
        ("sku,price\nsku-0,1\nnope,2\n", "line 3: no product 'nope'; nothing was changed"),
        ("sku,price\nsku-0,cheap\n", "line 2: price='cheap', wanted a number"),
        ("sku,price\nsku-0,nan\n", "line 2: price='nan', wanted a number"),
        ("sku,price\nsku-0\n", "line 2: wrong number of fields, 1 fields, wanted 2"),
        ("sku,price\nsku-0,1,2\n", "line 2: wrong number of fields, 3 fields"),
    ],
)
def test_invalid_update_changes_nothing(index, tmp_path, text, message):
    path = tmp_path / "prices.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        update_products(index, path)
    store = ProductStore(layout.current_version(index) / layout.PRODUCTS)
    assert shop_numbers(store.products([0])[0]) == {}
    store.close()


def test_damage_is_detected(index, capsys):
    """Each file in turn: a changed byte, or a missing end."""
    version = layout.current_version(index)
    assert cli.main(["index", "verify", "--index", str(index)]) == 0
    assert capsys.readouterr().out.strip().endswith("complete")
    damages = {
        layout.FEATURES: "features.f16",
        layout.CODES: "codes.u8",
        layout.ROW_PRODUCTS: "row_products.i32",
        layout.BINARY_ENCODER: "encoder",
        layout.REJECTION: "rejection",
        layout.PRODUCTS: "products.sqlite",
        layout.MANIFEST: "build the index again",
        "model/model.safetensors": "sha256 does not match",
    }
    for name, message in damages.items():
        before = (version / name).read_bytes()
        middle = len(before) // 2
        for damaged in (
            before[:middle],
            before[:middle] + bytes([before[middle] ^ 0x55]) + before[middle + 1 :],
        ):
            (version / name).write_bytes(damaged)
            code = cli.main(["index", "verify", "--index", str(index)])
            err = capsys.readouterr().err
            if name == layout.PRODUCTS and len(damaged) == len(before) and not code:
                continue  # a byte that no row uses, or one of a picture
            assert code == cli.INPUT_ERROR, (name, err)
            assert message in err, (name, err)
            assert len(err.splitlines()) == 1, (name, err)
        (version / name).write_bytes(before)
    assert verify_version(version, checksums=True) == []


def test_write_lock_is_exclusive(index, tmp_path):
    with (
        layout.write_lock(index),
        pytest.raises(InputError, match="another process is changing it"),
    ):
        remove_products(index, [sku(0)])


def test_quality_is_stored_as_json(index):
    store = ProductStore(layout.current_version(index) / layout.PRODUCTS)
    stored = store.connection.execute("SELECT quality FROM products").fetchall()
    assert [set(json.loads(row[0])) for row in stored] == [{"sharpness"}] * PRODUCTS
    store.close()


def test_class_weights_are_of_the_remaining_photos(index, tmp_path):
    """A new product with one of two photos deleted; with none left it has no class weights."""
    add_products(index, feed(tmp_path / "feed", [NEW]))
    store = ProductStore(layout.current_version(index) / layout.PRODUCTS)
    find = "SELECT image_id FROM photos WHERE product_id = ? ORDER BY row"
    first, second = (row[0] for row in store.connection.execute(find, (PRODUCTS,)))
    store.close()
    opened = LocalIndex(layout.current_version(index))
    both = opened.active_products().kernel[0]
    remove_products(index, [], photos=[first])
    assert opened.refresh()
    assert not np.allclose(opened.active_products().kernel[0], both)
    remove_products(index, [], photos=[second])
    assert opened.refresh()
    assert len(opened.active_products().new_products) == 0
    opened.close()


def test_missing_index_is_not_created(tmp_path):
    for call in (
        lambda i: remove_products(i, ["x"]),
        lambda i: add_products(i, tmp_path),
        lambda i: update_products(i, tmp_path),
    ):
        with pytest.raises(InputError, match="no product index there"):
            call(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_picture_of_another_product_is_a_fault(index):
    version = layout.current_version(index)
    assert verify_version(version) == []
    with (
        contextlib.closing(ProductStore(version / layout.PRODUCTS, writable=True)) as store,
        store.transaction() as connection,
    ):
        connection.execute("UPDATE pictures SET product_id = product_id + 1 WHERE row IN (0, 1)")
    assert verify_version(version) == [
        f"{layout.PRODUCTS}: 2 pictures of another product than their photos"
    ]


def test_class_weights_follow_the_title(index, tmp_path):
    """Of a new product, by update and by manifest; tags and trained products change none."""
    source = feed(tmp_path / "feed", [NEW], title="a new thing", category="kind 1")
    add_products(index, source)
    version = layout.current_version(index)

    def row():
        with contextlib.closing(ProductStore(version / layout.PRODUCTS)) as store:
            return store.state(WIDTH).kernel[0]

    first, table = row(), tmp_path / "update.csv"
    table.write_text(f"sku,tags\n{sku(NEW)},other\n")
    update_products(index, table)
    assert np.array_equal(row(), first)
    table.write_text(f"sku,category\n{sku(NEW)},kind 0\n{sku(0)},kind 1\n")
    assert update_products(index, table) == 2
    moved = row()
    assert np.linalg.norm(moved - first) > 1e-3
    assert faults(index) == []
    assert add_products(index, source).new_photos == 0
    np.testing.assert_allclose(row(), first, rtol=1e-6)


def test_category_changes_repeatedly(index, tmp_path):
    """By manifests and by updates; the product is returned in its current category."""
    table = tmp_path / "update.csv"
    for number in (1, 2, 1):
        add_products(index, feed(tmp_path / f"feed-{number}", [1], category=f"other {number}"))
    table.write_text(f"sku,category\n{sku(1)},kind 1\n")
    update_products(index, table)
    update_products(index, table)
    add_products(index, feed(tmp_path / "last", [1], category="other 3"))
    opened = LocalIndex(layout.current_version(index))
    query = np.asarray(opened._snapshot.features[-1], np.float32)[None]
    assert [n.product_id for n in opened.nearest(query, 1, category="other 3")[0].products] == [1]
    assert opened.product(sku(1)).category == "other 3"
    assert opened.nearest(query, 1, category="other 1")[0].products == []
    active = opened.active_products()
    assert [active.category_names[number] for number in active.product_category] == [
        "other 3" if number == 1 else f"kind {number % 2}" for number in range(PRODUCTS)
    ]
    opened.close()


def test_markup_alone_is_an_empty_cell(index, tmp_path):
    (tmp_path / "u.csv").write_text("sku,title\nsku-0,&nbsp;\nsku-1,<p></p>\n")
    titles = [record.title for record in products_of(index, [0, 1])]
    assert all(titles)
    assert update_products(index, tmp_path / "u.csv") == 2
    assert [record.title for record in products_of(index, [0, 1])] == titles


def products_of(index, ids):
    store = ProductStore(layout.current_version(index) / layout.PRODUCTS)
    try:
        return store.products(ids)
    finally:
        store.close()
