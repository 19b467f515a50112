"""The service over a copy in PostgreSQL: the same answers, through an outage of the database."""

import logging

import pytest
from helpers.made_photos import sku
from helpers.small_index import PRODUCTS, publish_copy

from sicot_jax.indexing.update import remove_products
from sicot_jax.serve import model_manager
from sicot_jax.serve.settings import ServiceSettings

psycopg = pytest.importorskip("psycopg", reason="a database is used with the extra postgres")
testclient = pytest.importorskip("fastapi.testclient", reason="the service needs its extra")

from helpers.service_process import post_photo, status_and_code, wait_until  # noqa: E402

from sicot_jax.index.backends.postgres_publish import publish_to_postgres  # noqa: E402
from sicot_jax.serve.app import create_app  # noqa: E402

pytestmark = pytest.mark.database


@pytest.fixture
def url(database_server):
    """An empty database."""
    with psycopg.connect(database_server.url(), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS service WITH (FORCE)")
        connection.execute("CREATE DATABASE service")
    return database_server.url("service")


def serving(index, url):
    return testclient.TestClient(
        create_app(
            ServiceSettings(
                index=str(index), database=url, engine="jax", max_batch=2, reload_seconds=0.05
            )
        )
    )


def test_answers_are_those_of_the_files(index, url):
    remove_products(index, [sku(2)])
    publish_to_postgres(index, url)
    with serving(index, "") as files, serving(index, url) as replica:
        for product in range(PRODUCTS):
            for path, params in (
                ("/v1/recognize", {"k": 3}),
                ("/v1/recognize", {"k": 100, "similar": 9, "category": "kind 1"}),
                ("/v1/search", {"similar": 4}),
            ):
                one, other = (
                    post_photo(client, product, path, **params).json()
                    for client in (files, replica)
                )
                for answer in (one, other):
                    answer.pop("request_id"), answer.pop("timings_ms")
                    for entry in answer["similar"]:
                        entry["similarity"] = pytest.approx(entry["similarity"], abs=2e-6)
                    for entry in [
                        *answer.get("products", []),
                        *answer["categories"],
                    ]:  # near photos have a vote in them
                        entry["probability"] = pytest.approx(entry["probability"], abs=2e-4)
                    answer["confidence"] = pytest.approx(answer.get("confidence"), abs=2e-4)
                assert one == other
            record = files.get(f"/v1/products/{sku(product)}")
            assert replica.get(f"/v1/products/{sku(product)}").json().get(
                "images"
            ) == record.json().get("images")
        address = f"/v1/products/{sku(1)}/images/0"
        assert replica.get(address).content == files.get(address).content
        assert replica.get("/v1/products/a%00b").status_code == 404


def test_a_publish_is_followed(index, url, small_version, monkeypatch, caplog):
    """And a version that is not published yet is not taken: the one before goes on."""
    monkeypatch.setattr(model_manager, "_RETRY_SECONDS", 0.05)
    publish_to_postgres(index, url)
    with serving(index, url) as client:
        remove_products(index, [sku(1)])
        publish_to_postgres(index, url)
        wait_until(lambda: client.get("/readyz").json()["products"] == PRODUCTS - 1)
        assert sku(1) not in post_photo(client, 1, k=100).text
        with caplog.at_level(logging.ERROR, "sicot"):
            publish_copy(index, small_version)
            wait_until(lambda: "has no copy of" in caplog.text)
        assert post_photo(client, 1).json()["index"] == "v000001"
        publish_to_postgres(index, url)
        wait_until(lambda: client.get("/readyz").json()["index"] == "v000002")
        assert post_photo(client, 1).json()["products"][0]["sku"] == sku(1)


def test_an_outage_of_the_database(index, url, database_server, caplog):
    publish_to_postgres(index, url)
    with serving(index, url) as client:
        assert post_photo(client, 1).status_code == 200
        database_server.stop()
        try:
            with caplog.at_level(logging.ERROR, "sicot"):
                for response in (post_photo(client, 1), client.get(f"/v1/products/{sku(1)}")):
                    assert status_and_code(response) == (503, "error")
                    assert response.headers["retry-after"] == "1"
                    assert "the index cannot be read at the moment" in response.text
            assert "database: " in caplog.text
            assert client.get("/healthz").status_code == 200
        finally:
            database_server.start()
        wait_until(lambda: post_photo(client, 1).status_code == 200)
        assert client.get(f"/v1/products/{sku(1)}").status_code == 200


def test_settings_do_not_show_the_address(index):
    assert "secret" not in repr(
        ServiceSettings(index=str(index), database="postgresql://u:secret@h/d")
    )
