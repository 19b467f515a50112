"""An index in PostgreSQL against the same in files: a real server with pgvector."""

import contextlib
import dataclasses
import itertools
import shutil
import sys
import threading

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo, sku, write_manifest_csv
from helpers.small_index import PHOTOS, PRODUCTS, WIDTH, publish_copy

from benchmarks import vector_search
from sicot_jax.cli import main as cli
from sicot_jax.common.linalg import l2_normalize
from sicot_jax.errors import InputError
from sicot_jax.index.backends import postgres_publish as publishing
from sicot_jax.index.backends.base import IndexUnavailableError, Neighbours
from sicot_jax.index.backends.open import open_index
from sicot_jax.index.storage import layout
from sicot_jax.index.storage import products as store_module
from sicot_jax.index.storage.products import ProductStore
from sicot_jax.index.storage.vectors import VectorFiles
from sicot_jax.indexing.add import add_products
from sicot_jax.indexing.update import remove_products, update_products

psycopg = pytest.importorskip("psycopg", reason="a database is used with the extra postgres")
pytest.importorskip("psycopg_pool", reason="a database is used with the extra postgres")

from sicot_jax.index.backends import postgres, postgres_schema  # noqa: E402
from sicot_jax.index.backends.postgres_publish import publish_to_postgres  # noqa: E402

pytestmark = pytest.mark.database


@pytest.fixture
def url(database_server):
    """An empty database."""
    name = f"test_{next(_NUMBERS)}"
    with psycopg.connect(database_server.url(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return database_server.url(name)


_NUMBERS = itertools.count()


@contextlib.contextmanager
def reading(index, url=""):
    opened = open_index(layout.current_version(index), url)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(params=["files", "database"])
def opened(request, index):
    """Both implementations, of an index with a deleted product, two deleted photos of another one,
    and a product without a class.
    """
    remove_products(index, [sku(2)])
    remove_products(index, [], photos=[f"{0:032x}", f"{1:032x}"])
    rows = [
        {"image": f"{n}.jpg", "sku": "new", "category": "kind 1", "title": "new one"}
        for n in range(2)
    ]
    feed = write_manifest_csv(
        index.parent / "feed", rows, {f"{n}.jpg": jpeg(photo(30, n)) for n in range(2)}
    )
    add_products(index, feed)
    url = ""
    if request.param == "database":
        url = request.getfixturevalue("url")
        publish_to_postgres(index, url)
    with reading(index, url) as opened_index:
        yield opened_index


def queries(count=10):
    return np.random.default_rng(1).random((count, WIDTH)).astype(np.float32)


def all_pairs(opened, embedding, k, category=None):
    """(product, row, similarity) of the nearest by all similarities."""
    with contextlib.closing(ProductStore(opened.folder / layout.PRODUCTS)) as store:
        rows = store.connection.execute(
            "SELECT row, product_id FROM photos JOIN products USING (product_id) "
            "WHERE NOT photos.deleted AND NOT products.deleted AND (?1 IS NULL OR category = ?1)",
            (category,),
        ).fetchall()
        num_rows = store.num_rows()
    vectors = VectorFiles(opened.folder, opened.manifest.width, opened.manifest.bits)
    similarity = np.asarray(vectors.memmap(layout.FEATURES, num_rows), np.float32) @ l2_normalize(
        embedding
    )
    best = {}
    for row, product in rows:
        best.setdefault(product, (product, row, float(similarity[row])))
        best[product] = max(
            best[product], (product, row, float(similarity[row])), key=lambda entry: entry[2]
        )
    return sorted(best.values(), key=lambda entry: -entry[2])[:k]


@pytest.mark.parametrize("graph", [False, True], ids=["compared all", "by the graph"])
def test_nearest_products_are_exact(opened, monkeypatch, graph):
    if graph:
        monkeypatch.setattr(postgres, "_EXACT", 0)
    for category, k in itertools.product(
        [None, "kind 0", "kind 1", "nothing", "\0"], [0, 1, 3, PRODUCTS + 5]
    ):
        for embedding, near in zip(
            queries(), opened.nearest(queries(), k, category=category), strict=True
        ):
            wanted = all_pairs(opened, embedding, k, category)
            assert [(n.product_id, n.row) for n in near.products] == [one[:2] for one in wanted]
            np.testing.assert_allclose(
                [n.similarity for n in near.products], [one[2] for one in wanted], rtol=1e-5
            )
        # One candidate is one product: the search widens by itself, and ends where there are no
        # more.
        assert len(
            opened.nearest(queries(1), k, category=category, candidates=1)[0].products
        ) == len(wanted)


def test_query_of_zeros_is_answered(opened):
    assert len(opened.nearest(np.zeros((1, WIDTH), np.float32), 2)[0].products) == 2


def test_records_equal_those_of_the_files(index, url):
    rows = [
        {
            "image": "0.jpg",
            "sku": "a/b 靴'",
            "title": "t\\x",
            "tags": "\t\n",
            "category": "",
            "price": "1.5",
        }
    ]
    add_products(index, write_manifest_csv(index.parent / "feed", rows, {"0.jpg": jpeg(photo(30))}))
    remove_products(index, [sku(4)], photos=[f"{0:032x}"])
    publish_to_postgres(index, url)
    with reading(index) as files, reading(index, url) as copy:
        numbers = [5, 0, 4, PRODUCTS, 99, 0]
        assert copy.products(numbers) == files.products(numbers)
        assert copy.products([]) == []
        for name in (sku(0), sku(4), "a/b 靴'", "nope", "\0"):
            assert copy.product(name) == files.product(name)
        for row in (0, 5, PRODUCTS * PHOTOS, 99):
            assert copy.picture(row) == files.picture(row)
        assert copy.counts() == files.counts()
        active_in_copy, active_in_files = copy.active_products(), files.active_products()
        for name in ("deleted", "new_products", "kernel", "bias"):
            np.testing.assert_array_equal(
                getattr(active_in_copy, name), getattr(active_in_files, name)
            )
            assert getattr(active_in_copy, name).dtype == getattr(active_in_files, name).dtype
        assert active_in_copy.kernel.shape == (1, WIDTH)


def test_codes_and_features_equal_those_of_the_files(index, url):
    """As text, whose order of bits may differ."""
    publish_to_postgres(index, url)
    folder = layout.current_version(index)
    manifest = layout.read_index_manifest(folder)
    vectors = VectorFiles(folder, manifest.width, manifest.bits)
    with psycopg.connect(url, autocommit=True) as connection:
        postgres_schema.use_schema(connection, postgres_schema.schema_name(folder))
        stored = connection.execute(
            "SELECT code::text, feature::text, product_id FROM photos ORDER BY row"
        ).fetchall()
    for (code, feature, product), row in zip(stored, range(PRODUCTS * PHOTOS), strict=True):
        bits = np.unpackbits(vectors.memmap(layout.CODES, row + 1)[row], bitorder="little")
        assert code == "".join(map(str, bits))
        np.testing.assert_array_equal(
            np.array(feature.strip("[]").split(","), np.float32),
            vectors.memmap(layout.FEATURES, row + 1)[row],
        )
        assert product == vectors.memmap(layout.ROW_PRODUCTS, row + 1)[row]


def test_large_files_are_not_needed(index, url):
    publish_to_postgres(index, url)
    for name in (layout.FEATURES, layout.CODES, layout.ROW_PRODUCTS, layout.PRODUCTS):
        (layout.current_version(index) / name).unlink()
    with reading(index, url) as copy:
        assert copy.nearest(queries(1), 1)[0].products
        assert copy.product(sku(1)).title == f"title {sku(1)}"


@pytest.fixture(scope="module")
def five_thousand(tmp_path_factory, small_version):
    """An index of 5,000 random vectors, ten categories and a rare one."""
    folder = tmp_path_factory.mktemp("many")
    manifest = layout.read_index_manifest(small_version)
    version = folder / "index" / "v000001"
    version.parent.mkdir()
    vector_search.write_version(version, vector_search.GaussianVectors(WIDTH), 5_000, 256, manifest)
    (folder / "index" / layout.CURRENT).write_text("v000001\n")
    with (
        contextlib.closing(ProductStore(version / layout.PRODUCTS, writable=True)) as store,
        store.transaction() as connection,
    ):
        kinds = ["rare" if n % 500 == 7 else f"kind {n % 10}" for n in range(5_000)]
        store_module.upsert_products(
            connection, ((n, sku(n), "", "", kinds[n], {}) for n in range(5_000))
        )
        store_module.insert_photos(connection, ((n, n, f"{n:032x}", None) for n in range(5_000)))
    return folder / "index"


def next_night(index, night):
    """New prices of all products, one withdrawn and back, 100 photos removed and added anew."""
    version = layout.current_version(index)
    vectors = VectorFiles(version, WIDTH, 256)
    store = ProductStore(version / layout.PRODUCTS, writable=True)
    with contextlib.closing(store), store.transaction() as connection:
        connection.execute(
            "UPDATE products SET quality = ?, deleted = (product_id = 7 AND ?)",
            (f'{{"price": {night}.5}}', night % 2 == 0),
        )
        first = store.num_rows()
        for name in layout.APPENDABLE:
            vectors.write_rows(name, first, vectors.memmap(name, 200)[100:])
        connection.execute(
            "UPDATE photos SET deleted = 1 WHERE product_id >= 100 AND product_id < 200"
        )
        lines = ((first + n, 100 + n, f"{100 + n:032x}", None) for n in range(100))
        store_module.insert_photos(connection, lines)
        store_module.set_num_rows(connection, first + 100)


@pytest.mark.slow
def test_hundred_nights_beside_a_long_transaction(five_thousand, url, tmp_path):
    """Answers and graph stay whole, though no line that was replaced can be freed."""
    index = tmp_path / "index"
    shutil.copytree(five_thousand, index)
    publish_to_postgres(index, url)
    query_vectors = vector_search.GaussianVectors(WIDTH)(20, np.random.default_rng(5))
    size = "SELECT pg_relation_size('nearest_codes')"

    def answers(copy):
        near = copy.nearest(query_vectors, 10, num_photos=100)
        products = [[(n.product_id, n.similarity) for n in one.products] for one in near]
        return products, [[n.similarity for n in one.photos] for one in near]

    with (
        psycopg.connect(url) as long,
        psycopg.connect(url, autocommit=True) as connection,
        reading(index, url) as copy,
    ):
        long.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        long.execute("SELECT pg_current_xact_id()")
        schema = postgres_schema.schema_name(layout.current_version(index))
        postgres_schema.use_schema(connection, schema)
        before, whole = connection.execute(size).fetchone(), answers(copy)
        for night in range(100):
            next_night(index, night)
            report = publish_to_postgres(index, url)
            assert (report.new_photos, report.changes) == (100, 5_100)
        assert copy.refresh()
        assert connection.execute(size).fetchone() == before
        assert answers(copy) == whole
        with copy._connection() as searching:
            values = {"k": 10, "photos": 100, "category": None}
            values |= {"query": f"[{','.join(['0.1'] * WIDTH)}]", "code": "01" * 128}
            assert copy._execute(searching, values, "photos", 1000).photos == 1000
        assert copy.product(sku(3)).quality == {"price": 99.5}


def test_recall(five_thousand, url):
    """Of all products, of a category, and with deleted ones, none of which the graph knows."""
    publish_to_postgres(five_thousand, url)
    query_vectors = vector_search.GaussianVectors(WIDTH)(20, np.random.default_rng(5))
    with reading(five_thousand, url) as copy:

        def recall(**more):
            hits = [
                len(
                    {n.row for n in copy.nearest(q[None], 10, **more)[0].products}
                    & {w[1] for w in all_pairs(copy, q, 10, **more)}
                )
                for q in query_vectors
            ]
            return np.mean(hits) / 10

        with copy._connection() as connection:
            plan = connection.execute(
                "EXPLAIN SELECT code FROM codes "
                f"ORDER BY code <~> '{'0' * 256}'::bit(256) LIMIT 100"
            ).fetchall()
        assert "nearest_codes" in str(plan)
        assert recall() >= 0.95
        assert recall(category="kind 3") == 1 == recall(category="rare")
        even = [sku(n) for n in range(0, 5_000, 2)]
        remove_products(five_thousand, even, max_change_share=1)
        publish_to_postgres(five_thousand, url)
        assert {
            n.product_id % 2 for q in query_vectors for n in copy.nearest(q[None], 10)[0].products
        } == {1}
        assert recall() >= 0.95
        assert copy.nearest(query_vectors[:1], 10, category="kind 2") == [Neighbours([], [])]


def test_second_publish_changes_nothing(index, url):
    first, second = publish_to_postgres(index, url), publish_to_postgres(index, url)
    assert (first.revision, first.new_photos, first.changes) == (1, PRODUCTS * PHOTOS, PRODUCTS)
    assert (second.revision, second.new_photos, second.changes) == (1, 0, 0)
    assert second.summary() == "v000001, revision 1: is there already"


def test_refresh_sees_published_changes(index, url, tmp_path):
    publish_to_postgres(index, url)
    with reading(index, url) as copy:
        rows = [
            {"image": f"{n}.jpg", "sku": name, "category": "fresh"}
            for n, name in enumerate(["new", sku(1)])
        ]
        feed = write_manifest_csv(
            tmp_path / "feed", rows, {f"{n}.jpg": jpeg(photo(30 + n)) for n in range(2)}
        )
        add_products(index, feed)
        remove_products(index, [sku(2)], photos=[f"{0:032x}"])
        (tmp_path / "more.csv").write_text(f"sku,title,price\n{sku(3)},other,2.5\n")
        update_products(index, tmp_path / "more.csv")
        assert not copy.refresh()
        assert copy.product("new") is None
        assert copy.product(sku(2))
        assert copy.product(sku(3)).title == f"title {sku(3)}"
        assert copy.counts() == {"products": PRODUCTS, "photos": PRODUCTS * PHOTOS}
        published = publish_to_postgres(index, url)
        # Products: new, 1 (category), 2 and 3; a deleted photo; a row of the classifier.
        assert (published.revision, published.new_photos, published.changes) == (2, 2, 6)
        assert copy.active_products().new_products.tolist() == []  # until
        assert copy.refresh()
        assert not copy.refresh()
        assert copy.active_products().new_products.tolist() == [PRODUCTS]
        assert copy.active_products().deleted.tolist() == [2]
        with reading(index) as files:
            assert copy.counts() == files.counts()
            everything = range(PRODUCTS + 1)
            assert copy.products(everything) == files.products(everything)
            quality = dict(copy.product(sku(3)).quality)
            assert quality.pop("sharpness") > 0  # the build measured it on the photo
            assert quality == {"price": 2.5}
            assert copy.count_photos(1) == files.count_photos(1) == PHOTOS + 1
            for category in (None, "fresh", "kind 0", "kind 1"):
                near_in_copy, near_in_files = (
                    one.nearest(queries(), 9, num_photos=7, category=category)
                    for one in (copy, files)
                )
                for part in ("products", "photos"):
                    one, other = (
                        [[n.row for n in getattr(f, part)] for f in side]
                        for side in (near_in_copy, near_in_files)
                    )
                    assert one == other
                    assert all(one)
            assert copy.active_products().category_names == ("fresh", "kind 0", "kind 1")
            for one in (copy, files):
                product_categories = [
                    one.active_products().category_names[number]
                    for number in one.active_products().product_category
                ]
                assert product_categories == [
                    record.category if record else f"kind {n % 2}"
                    for n, record in enumerate(one.products(everything))
                ]


def test_embeddings_that_no_line_holds_are_refused(index, url):
    """Before anything is copied; the widest that fit are copied, whatever the code and the id."""
    version = layout.current_version(index)
    manifest = layout.read_index_manifest(version)
    layout.write_index_manifest(version, dataclasses.replace(manifest, width=4041))
    with pytest.raises(
        InputError, match=r"of 4041 numbers, wanted at most 4040, .*embedding_width=4040, or serve"
    ):
        publish_to_postgres(index, url)
    rng = np.random.default_rng(0)
    with psycopg.connect(url) as connection:
        postgres_schema.create_extension(connection)
        for bits in (8, 256, 4096):
            widest = dataclasses.replace(manifest, width=postgres_schema.MAX_WIDTH, bits=bits)
            connection.execute("SELECT set_config('search_path', %s, false)", [f"s{bits}, public"])
            postgres_schema.create_tables(connection, f"s{bits}", widest)
            feature = publishing.feature_fields(rng.random((1, 4040)).astype(np.float16))[0]
            code = publishing.code_fields(rng.integers(0, 256, (1, bits // 8), np.uint8))[0]
            line = (1, 1, rng.bytes(60).hex(), False, code, feature)
            types = ["int4", "int4", "text", "bool", "bytea", "bytea"]
            assert publishing._copy_in(connection, "photos", [line], types) == 1


def test_photo_without_a_finite_embedding_is_named(index, url):
    version = layout.current_version(index)
    vectors = VectorFiles(version, WIDTH, layout.read_index_manifest(version).bits)
    features = vectors.memmap(layout.FEATURES, PRODUCTS * PHOTOS, writable=True)
    features[5, 3] = np.nan
    features.flush()
    with pytest.raises(InputError, match=rf"photo {5:032x}: its embedding has numbers .* 1 of 24"):
        publish_to_postgres(index, url)


def test_class_weights_are_deleted(index, url, tmp_path):
    """Of a new product whose last photo was deleted."""
    feed = write_manifest_csv(
        tmp_path / "feed", [{"image": "0.jpg", "sku": "new"}], {"0.jpg": jpeg(photo(30))}
    )
    add_products(index, feed)
    publish_to_postgres(index, url)
    with reading(index, url) as copy:
        assert copy.active_products().new_products.tolist() == [PRODUCTS]
        with contextlib.closing(
            ProductStore(layout.current_version(index) / layout.PRODUCTS)
        ) as store:
            find = "SELECT image_id FROM photos WHERE product_id = ?"
            image_id = store.connection.execute(find, (PRODUCTS,)).fetchone()[0]
        remove_products(index, [], photos=[image_id])
        publish_to_postgres(index, url)
        assert copy.refresh()
        assert copy.active_products().new_products.tolist() == []


@pytest.mark.parametrize(
    "where", ["_update", "_update_state", "postgres_schema.create_indexes", "_fetch_value"]
)
def test_stopped_publish_leaves_the_old_version(index, url, small_version, monkeypatch, where):
    publish_to_postgres(index, url)
    with reading(index, url) as copy:
        before = copy.nearest(queries(3), 3)
        version = publish_copy(index, small_version)
        owner, name = (
            (publishing.postgres_schema, where.split(".")[1])
            if "." in where
            else (publishing, where)
        )
        original = getattr(owner, name)

        def stopped(connection, *arguments):
            if where != "_fetch_value" or "revision" in arguments[0]:
                raise KeyboardInterrupt
            return original(connection, *arguments)

        monkeypatch.setattr(owner, name, stopped)
        with pytest.raises(KeyboardInterrupt):
            publish_to_postgres(index, url)
        monkeypatch.undo()
        assert copy.nearest(queries(3), 3) == before
        assert not copy.refresh()
        with psycopg.connect(url) as connection:
            (schema,) = connection.execute("SELECT schema FROM sicot.versions").fetchall()
            schemas = connection.execute(
                "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'sicot%'"
            ).fetchall()
            assert sorted(schemas) == [("sicot",), schema]
            assert "v000001" in schema[0]
        with pytest.raises(
            InputError,
            match=r"has no copy of .*v000002; make it with `sicot index publish --index",
        ):
            open_index(version, url)
        assert publish_to_postgres(index, url).new_photos == PRODUCTS * PHOTOS
        with reading(index, url) as newer:
            assert newer.folder.name == "v000002"
            assert newer.counts()["products"] == PRODUCTS


def test_publish_keeps_the_previous_version_alone(index, url, small_version):
    with contextlib.ExitStack() as stack:
        copies = []
        for version in range(3):
            if version:
                publish_copy(index, small_version)
            publish_to_postgres(index, url)
            copies.append(stack.enter_context(reading(index, url)))
        for copy in copies[1:]:
            assert copy.nearest(queries(1), 1)[0].products
        with pytest.raises(IndexUnavailableError):
            copies[0].nearest(queries(1), 1)
        with pytest.raises(IndexUnavailableError):
            copies[0].refresh()
        # And back: what is there is not copied again, and is the last one now.
        (index / layout.CURRENT).write_text("v000002\n")
        assert publish_to_postgres(index, url).summary() == "v000002, revision 1: is there already"


def test_rebuilt_version_of_the_same_name_is_another_one(index, url, small_version):
    publish_to_postgres(index, url)
    shutil.rmtree(index)
    version = publish_copy(index, small_version)
    manifest = layout.read_index_manifest(version)
    manifest.sha256["made"] = "later"
    layout.write_index_manifest(version, manifest)
    with pytest.raises(InputError, match="has no copy of"):
        open_index(version, url)
    assert publish_to_postgres(index, url).new_photos == PRODUCTS * PHOTOS


def test_publish_is_exclusive(index, url):
    with psycopg.connect(url) as connection:
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [publishing._LOCK])
        with pytest.raises(InputError, match="another process publishes to it; wait for it to end"):
            publish_to_postgres(index, url)
    publish_to_postgres(index, url)


def test_publish_copies_one_commit(index, url, monkeypatch):
    """A change during a publish is copied by the next one."""
    original = publishing._update

    def changed(*arguments):
        thread = threading.Thread(target=remove_products, args=(index, [sku(1)]))
        thread.start()
        thread.join()
        return original(*arguments)

    monkeypatch.setattr(publishing, "_update", changed)
    publish_to_postgres(index, url)
    monkeypatch.undo()
    with reading(index, url) as copy:
        assert copy.counts()["products"] == PRODUCTS
        assert copy.product(sku(1))
        assert publish_to_postgres(index, url).changes == 1
        assert copy.refresh()
        assert copy.product(sku(1)) is None


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "address",
    [
        "nonsense",
        "http://u:secret@h/d",
        "postgresql://u:se@secret@h/d",
        "postgresql://u:1/secret@h/d",
        "postgresql://u:a?secret@h/d",
        "postgresql://u:a#secret@h/d",
        "postgresql://u:secret%@h/d",
        "postgresql://u:secret@[h/d",
        "postgresql://u:secret@h/d?nope=1",
    ],
)
def test_invalid_address_is_not_shown(index, address):
    for call in (
        lambda: publish_to_postgres(index, address),
        lambda: open_index(layout.current_version(index), address),
    ):
        with pytest.raises(
            InputError, match="the database's address cannot be read, wanted postgresql://"
        ) as error:
            call()
        assert "secret" not in one_line(error)
        assert address not in one_line(error)


def test_unreachable_database_is_one_line(index, database_server, url, capsys):
    unreachable = "postgresql://someone:secret@127.0.0.1:1/shop"
    for call in (
        lambda: publish_to_postgres(index, unreachable),
        lambda: open_index(layout.current_version(index), unreachable),
    ):
        with pytest.raises(
            InputError, match=r"postgresql://127.0.0.1/shop: .*refused.*; start the database, or"
        ) as error:
            call()
        assert "secret" not in one_line(error)
    with pytest.raises(InputError, match='database "none" does not exist'):
        publish_to_postgres(index, database_server.url("none"))
    with pytest.raises(
        InputError, match=r"has no copy of .*v000001; make it with `sicot index publish --index "
    ) as error:
        open_index(layout.current_version(index), url)
    one_line(error)
    assert cli.main(["index", "publish", "--index", str(index), "--database", unreachable]) == 2
    assert "secret" not in capsys.readouterr().err
    assert cli.main(["index", "publish", "--index", str(index), "--database", url]) == 0
    assert capsys.readouterr().out == "v000001, revision 1: 24 photos new, 6 other changes\n"


def test_missing_or_old_pgvector_is_one_line(index, url, monkeypatch):
    name = f"reader_{next(_NUMBERS)}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} LOGIN")
    reader = url.replace("postgres@", f"{name}@")
    with pytest.raises(
        InputError, match=r"pgvector: none \(permission denied .*\), wanted 0.8 or later; inst"
    ) as error:
        publish_to_postgres(index, reader)
    one_line(error)
    publish_to_postgres(index, url)
    with pytest.raises(
        InputError, match="permission denied for schema sicot"
    ):  # a role that was given no rights
        open_index(layout.current_version(index), reader)
    monkeypatch.setattr(postgres_schema, "MIN_PGVECTOR", (99, 1))
    for call in (
        lambda: publish_to_postgres(index, url),
        lambda: open_index(layout.current_version(index), url),
    ):
        with pytest.raises(
            InputError,
            match=r"pgvector: 0.*, wanted 99.1 or later; .* ALTER EXTENSION vector UPDATE",
        ):
            call()


def test_missing_packages_are_one_line(index, monkeypatch):
    for name in ("sicot_jax.index.backends.postgres", "sicot_jax.index.backends.postgres_publish"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "psycopg_pool", None)
    with pytest.raises(
        InputError,
        match="no psycopg_pool here to use a database with; install it: pip install 'sicot_jax",
    ):
        open_index(layout.current_version(index), "postgresql://h/d")


def test_connections_close_with_the_last_reference(index, url):
    publish_to_postgres(index, url)
    opened = open_index(layout.current_version(index), url)
    opened.nearest(queries(1), 1)
    workers = list(opened._pool._workers)
    del opened
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()


def test_recovers_from_a_database_restart(index, database_server, url):
    publish_to_postgres(index, url)
    with reading(index, url) as copy:
        before = copy.nearest(queries(3), 3)
        database_server.stop()
        for call in (
            lambda: copy.nearest(queries(1), 1),
            lambda: copy.products([1]),
            lambda: copy.product(sku(1)),
            lambda: copy.picture(1),
            copy.refresh,
        ):
            with pytest.raises(IndexUnavailableError):
                call()
        database_server.start()
        assert copy.nearest(queries(3), 3) == before
        assert not copy.refresh()
