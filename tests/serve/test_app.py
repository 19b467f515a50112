"""The HTTP interface as a client uses it."""

import base64
import dataclasses
import io
import json
import logging
import re
import time
from pathlib import Path
from urllib.parse import quote, urljoin

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo, sku, write_manifest_csv
from helpers.service_process import post_photo, status_and_code, wait_until
from helpers.small_index import PHOTOS, PREPROCESSING, PRODUCTS, build_small_index, publish_copy
from PIL import Image

from sicot_jax.errors import InputError
from sicot_jax.indexing.add import add_products
from sicot_jax.indexing.update import remove_products
from sicot_jax.serve.api_keys import add_api_key
from sicot_jax.serve.model_manager import load_serving_model
from sicot_jax.serve.photo import PhotoLimits
from sicot_jax.serve.settings import ServiceSettings

testclient = pytest.importorskip("fastapi.testclient", reason="the service needs its extra")

from sicot_jax.serve.app import create_app  # noqa: E402


def settings(index, **more):
    return ServiceSettings(
        index=str(index), **{"engine": "jax", "max_batch": 2, "reload_seconds": 0.05, **more}
    )


@pytest.fixture
def client(index):
    with testclient.TestClient(
        create_app(settings(index, events=str(index / "events.sqlite")))
    ) as client:
        yield client


def test_every_product_is_recognised(client):
    for product in range(PRODUCTS):
        answer = post_photo(client, product, k=3, similar=4).json()
        assert answer["products"][0]["sku"] == answer["similar"][0]["sku"] == sku(product)
        assert len(answer["products"]) == 3
        assert len(answer["similar"]) == (PRODUCTS // 2 if answer["searched"] else 4)
        assert answer["known"] is True
        assert 0.5 < answer["confidence"] <= 1
        shares = [product["probability"] for product in answer["products"]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) < 1 + 3e-6
        assert [c["name"] for c in answer["categories"]] == [
            f"kind {product % 2}",
            f"kind {1 - product % 2}",
        ]
        assert set(answer["timings_ms"]) == {"read", "decode", "engine", "search"}
        assert answer["index"] == "v000001"
        assert len(answer["model"]) == 12


def test_a_photo_comes_in_four_ways(client):
    data = jpeg(photo(1, 99))
    ways = [
        {"files": {"photo": ("my photo.jpg", data, "image/jpeg")}},
        {"json": {"photo": base64.b64encode(data).decode()}},
        {"content": data, "headers": {"Content-Type": "image/jpeg"}},
        {"content": data, "headers": {"Content-Type": "application/octet-stream"}},
    ]
    answers = [client.post("/v1/recognize", params={"k": 2}, **way).json() for way in ways]
    assert all(answer["products"] == answers[0]["products"] for answer in answers)


def test_similar_products_of_a_category(client):
    answer = post_photo(client, 2, "/v1/search", similar=9, category="kind 1").json()
    assert "products" not in answer
    assert len(answer["similar"]) == PRODUCTS // 2
    assert {product["category"] for product in answer["similar"]} == {"kind 1"}


def test_similar_products_are_limited_to_a_confident_category(client):
    """Or to the one that the request names."""
    sure = post_photo(client, 2, similar=9).json()
    assert sure["categories"][0]["probability"] >= 0.9
    assert sure["searched"] == "kind 0"
    assert {product["category"] for product in sure["similar"]} == {"kind 0"}
    assert len(sure["similar"]) == PRODUCTS // 2
    every = post_photo(client, 2, "/v1/search", similar=9, any_category=True).json()
    assert every["searched"] is None
    assert len(every["similar"]) == PRODUCTS
    assert every["categories"] == sure["categories"]
    other = post_photo(client, 2, similar=9, category="kind 1").json()
    assert other["searched"] == "kind 1"
    assert {product["category"] for product in other["similar"]} == {"kind 1"}


def rotated(pixels, orientation):
    """A PNG that says how it is to be turned."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(out, "PNG", exif=exif)
    return out.getvalue()


def predict_box(client, monkeypatch, box):
    """Makes the service's engine predict the same box in every photo."""
    batcher = client.app.state.service.models.current.batcher
    engine = batcher.engine
    monkeypatch.setattr(
        batcher, "engine", lambda photos: engine(photos)._replace(box=np.array([box] * len(photos)))
    )


@pytest.mark.parametrize("path", ["/v1/recognize", "/v1/search"])
def test_a_box_selects_one_of_two_products(client, path):
    """Of two side by side; also where the camera lay on its side, so that they are one above the
    other in the file.
    """
    both = np.concatenate([photo(1, 99), photo(4, 99)], 1)
    for data in (jpeg(both, "PNG"), rotated(np.rot90(both), 6)):
        for product, box in ((1, "0,0,0.5,1"), (4, "0.5,0,1,1")):
            answer = client.post(path, files={"photo": data}, params={"box": box}).json()
            assert (
                answer["similar"][0]["sku"]
                == answer.get("products", answer["similar"])[0]["sku"]
                == sku(product)
            )
            assert answer["box"] == [float(side) for side in box.split(",")]
            assert answer["box_given"] is True


def test_the_full_photo_as_a_box_changes_nothing(client):
    without_box, full = post_photo(client, 3).json(), post_photo(client, 3, box="0,0,1,1").json()
    assert without_box["products"] == full["products"]
    assert without_box["similar"] == full["similar"]
    assert without_box["box"] is None
    assert without_box["box_given"] is False
    assert full["box"] == [0, 0, 1, 1]
    assert full["box_given"] is True


def test_a_model_with_localization_returns_its_box(tmp_path):
    """An untrained branch predicts the full photo."""
    build_small_index(tmp_path / "index", box="image")
    with testclient.TestClient(create_app(settings(tmp_path / "index"))) as client:
        answer = post_photo(client, 3).json()
    assert answer["box"] == pytest.approx([0, 0, 1, 1], abs=0.02)
    assert answer["box_given"] is False
    assert answer["products"][0]["sku"] == sku(3)


def test_the_predicted_box_is_relative_to_the_full_photo(client, monkeypatch):
    """The middle quarter of 96 x 24 is seen. Where the camera lay on its side the photo is upright
    first.
    """
    predict_box(client, monkeypatch, [0.0, 0.25, 0.5, 1.0])
    wide = np.concatenate([photo(product, 99) for product in range(4)], 1)

    def box(data, **params):
        answer = client.post("/v1/recognize", files={"photo": data}, params=params).json()
        assert answer["box_given"] is bool(params)
        return answer["box"]

    assert box(jpeg(photo(1, 99))) == [0, 0.25, 0.5, 1]
    assert box(jpeg(wide)) == [0.375, 0.25, 0.5, 1]
    assert box(rotated(wide, 6)) == [0, 0.4375, 0.5, 0.625]  # 24 x 96 as a person sees it
    assert box(jpeg(wide), box="0.1,0.2,0.3,0.4") == [
        0.1,
        0.2,
        0.3,
        0.4,
    ]  # and the model's does not count


def test_the_centre_crop_is_undone(client, monkeypatch):
    """Resized to 32 x 32, of which 24 x 24 are seen: from 4 / 32 to 28 / 32."""
    predict_box(client, monkeypatch, [0.0, 0.5, 1.0, 1.0])
    models = client.app.state.service.models
    larger = dataclasses.replace(PREPROCESSING, resize_height=32, resize_width=32)
    engine = dataclasses.replace(models.current.engine, preprocessing=larger)
    models.current = dataclasses.replace(models.current, engine=engine)
    assert post_photo(client, 1).json()["box"] == [0.125, 0.5, 0.875, 0.875]


def test_a_predicted_box_is_clipped_to_the_photo(client, monkeypatch):
    predict_box(client, monkeypatch, [-0.2, 0.1, 1.3, 0.9])
    assert post_photo(client, 1, "/v1/search").json()["box"] == [0, 0.1, 1, 0.9]


@pytest.mark.parametrize("path", ["/v1/recognize", "/v1/search"])
@pytest.mark.parametrize(
    "box", ["1", "0,0,1", "a,b,c,d", "nan,0,1,1", "0,0,inf,1", "0.6,0,0.4,1", "0,0,0.01,1"]
)
def test_malformed_boxes_are_refused(client, path, box):
    response = post_photo(client, 1, path, box=box)
    assert status_and_code(response) == (422, "bad_input")
    assert "wanted left,top,right,bottom" in response.json()["error"]["message"]


def test_a_very_long_box_is_refused(client):
    assert status_and_code(post_photo(client, 1, box="0," * 9_000)) == (422, "bad_parameter")


def test_a_box_does_not_make_a_photo_of_other_bytes(client):
    for data, wanted in ((b"no photo", (415, "not_a_photo")), (b"", (400, "no_photo"))):
        assert (
            status_and_code(client.post("/v1/search?box=0,0,1,0.5", files={"photo": data}))
            == wanted
        )


def test_products_and_pictures(client):
    record = client.get(f"/v1/products/{sku(3)}").json()
    assert record["title"] == f"title {sku(3)}"
    assert client.get(f"/v1/products/\u3000{sku(3)}\u00a0").json() == record  # other blanks
    assert record["photos"] == len(record["images"]) == PHOTOS
    picture = client.get(record["images"][1])
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content[:2] == b"\xff\xd8"
    for path in (
        "/v1/products/nope",
        f"/v1/products/{sku(3)}/images/99",
        f"/v1/products/{sku(3)}/images/-1",
        "/v1/nope",
    ):
        assert status_and_code(client.get(path)) == (404, "not_found")


def test_skus_that_resemble_paths(index, tmp_path):
    """A slash, dots, a question mark, letters beyond ASCII: products and pictures by the addresses
    in answers.
    """
    odd = ["a/b", "../../etc/passwd", "100%?x=1#y", "Stiefel ü 靴", "a/images/0"]
    rows = [{"image": f"{n}.jpg", "sku": name} for n, name in enumerate(odd)]
    photos = {f"{n}.jpg": jpeg(photo(20 + n)) for n in range(len(odd))}
    add_products(index, write_manifest_csv(tmp_path / "feed", rows, photos))
    with testclient.TestClient(create_app(settings(index))) as client:
        for n, name in enumerate(odd):
            similar = client.post(
                "/v1/search?similar=1", files={"photo": photos[f"{n}.jpg"]}
            ).json()["similar"][0]
            assert similar["sku"] == name
            assert client.get(similar["images"][0]).content == photos[f"{n}.jpg"]


def test_the_address_of_a_card_and_of_a_picture_differ(index, tmp_path):
    """Also for SKUs that end like the address of a picture, and for dots, which clients resolve."""
    odd = [f"{sku(1)}/images/0", "a/images/b", "..", "."]
    rows = [{"image": f"{n}.jpg", "sku": name} for n, name in enumerate(odd)]
    photos = {f"{n}.jpg": jpeg(photo(20 + n)) for n in range(len(odd))}
    add_products(index, write_manifest_csv(tmp_path / "feed", rows, photos))
    with testclient.TestClient(create_app(settings(index))) as client:
        for n, name in enumerate(odd):
            card = client.get("/v1/products", params={"sku": name}).json()
            assert card["sku"] == name
            assert client.get(card["images"][0]).content == photos[f"{n}.jpg"]
            if not name.startswith("."):
                assert client.get(f"/v1/products/{quote(name, safe='')}").json() == card
        # As an HTTP client makes it of /v1/products/../images/0:
        assert client.get("/v1/images/0").content == photos["2.jpg"]
        assert client.get(f"/v1/products/{sku(1)}/images/0").headers["content-type"] == "image/jpeg"
        for path in (f"/v1/products/{sku(1)}/images/x", "/v1/images/0?sku=x", "/v1/products?sku=x"):
            assert status_and_code(client.get(path)) == (404, "not_found")
        for path in ("/v1/images/x", "/v1/images/-1", "/v1/products"):
            assert client.get(path).status_code in (404, 422)


def test_head_is_answered_where_get_is(client, index, tmp_path):
    """With the same status and headers, and nothing more."""
    record = client.get(f"/v1/products/{sku(3)}").json()
    paths = ["/", "/page.js", "/healthz", "/readyz", "/metrics", "/openapi.json"]
    for path in [*paths, f"/v1/products/{sku(3)}", f"/{record['images'][0]}", "/v1/products/x"]:
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
        if path != "/metrics":
            assert head.headers["content-length"] == str(len(get.content))
    refused = client.head("/v1/recognize")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert client.post("/healthz").headers["allow"] == "GET, HEAD"
    add_api_key(tmp_path / "keys", "shop")
    with testclient.TestClient(
        create_app(settings(index, keys=str(tmp_path / "keys")))
    ) as with_keys:
        assert with_keys.head("/v1/products/sku-1").status_code == 401
        assert with_keys.head("/healthz").status_code == 200


@pytest.mark.parametrize("stripped", [True, False])
def test_behind_a_prefix(index, tmp_path, stripped):
    """Whether the proxy removes it from the path or not; keys are asked for all the same."""
    key = add_api_key(tmp_path / "keys", "shop")
    made = create_app(settings(index, keys=str(tmp_path / "keys"), root_path="/find"))
    prefix = "" if stripped else "/find"
    with testclient.TestClient(made) as client:
        assert client.get(f"{prefix}/").text.startswith("<!doctype html>")
        assert client.get(f"{prefix}/healthz").status_code == 200
        for path in ("/v1/products/sku-1", "/metrics", "/openapi.json"):
            assert status_and_code(client.get(prefix + path)) == (401, "no_key")
        client.headers["Authorization"] = f"Bearer {key}"
        assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/find"}]
        photo_file = {"photo": jpeg(photo(1, 99))}
        (product,) = client.post(f"{prefix}/v1/recognize?k=1", files=photo_file).json()["products"]
        page = f"http://shop.example{prefix}/"
        assert client.get(urljoin(page, product["images"][0])).content[:2] == b"\xff\xd8"


def test_addresses_hold_behind_a_prefix_that_the_service_does_not_know(client):
    """Relative to the page's."""
    for image in post_photo(client, 1, k=1).json()["products"][0]["images"]:
        assert urljoin("https://shop.example/find/", image).startswith(
            f"https://shop.example/find/v1/products/{sku(1)}/images/"
        )


def test_keys_are_asked_for_below_the_root_path_of_a_server(index, tmp_path):
    """Servers such as Ray Serve set the prefix of a connection themselves."""
    add_api_key(tmp_path / "keys", "shop")
    made = create_app(settings(index, keys=str(tmp_path / "keys")))
    with testclient.TestClient(made, root_path="/find") as client:
        assert status_and_code(client.get("/find/v1/products/sku-1")) == (401, "no_key")


def test_parameters_without_a_value_are_not_given(client):
    """As a form sends them, and as the documentation once listed them."""
    plain = post_photo(client, 1).json()
    empty = post_photo(client, 1, category="", any_category="", rerank="", box="", k="").json()
    assert empty["similar"] == plain["similar"]
    assert empty["products"] == plain["products"]
    assert empty["searched"] == plain["searched"]


def test_a_category_is_spelled_as_people_type_it(client):
    wanted = post_photo(client, 2, "/v1/search", similar=9, category="kind 1").json()["similar"]
    for category in (" kind\u00a0 1 ", "kind 1\n"):
        answer = post_photo(client, 2, "/v1/search", similar=9, category=category).json()
        assert answer["similar"] == wanted
    assert post_photo(client, 2, "/v1/search", category=" ").status_code == 200


@pytest.mark.parametrize("path", ["/v1/recognize", "/v1/search"])
@pytest.mark.parametrize("category", ["KIND 1", "kinds 1"])
def test_an_unknown_category_is_refused_with_the_nearest(client, path, category):
    response = post_photo(client, 2, path, category=category)
    assert status_and_code(response) == (422, "bad_input")
    message = response.json()["error"]["message"]
    assert f"category={category!r}: no such category, wanted 'kind 1', 'kind 0'; " in message
    other = post_photo(client, 2, path, category="q")
    assert "wanted one of the catalogue's" in other.json()["error"]["message"]


HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "serve.md"


def test_the_documented_addresses_are_answered(client):
    """Every request and parameter of the tables, as it is written there."""
    text = HOW_TO.read_text()
    image = {"files": {"photo": jpeg(photo(1, 99))}}
    gets = re.findall(r"`(?:GET )?(/[\w/.?=]*)`", text)
    assert {"/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/products/SKU"} <= set(gets)
    for path in gets:
        response = client.get(path.replace("SKU", sku(1)).replace("/N", "/0"))
        assert response.status_code == 200, path
    posts = re.findall(r"`POST (/\S+)`", text)
    assert len(posts) == 3
    queries = re.findall(r"`([a-z_]+=[^` ]+)`", text)
    assert len(queries) >= 4
    for path in posts:
        if path == "/v1/events":
            assert client.post(path, json=[]).status_code == 202
            continue
        for query in ("", *queries):
            address = path + ("&" if "?" in path else "?") + query.replace("NAME", "kind 1")
            assert client.post(address, **image).status_code == 200, address
    (curl,) = re.findall(r"curl -F photo=@photo.jpg 'http://127.0.0.1:8000(\S+)'", text)
    assert len(client.post(curl, **image).json()["products"]) == 3


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        ({"files": {"photo": b"not a photo"}}, (415, "not_a_photo")),
        ({"files": {"photo": b""}}, (400, "no_photo")),
        ({"files": {"other": b"x"}}, (400, "no_photo")),
        ({"data": {"photo": "text"}}, (415, "content_type")),
        ({"json": {}}, (400, "no_photo")),
        ({"json": [1]}, (400, "no_photo")),
        ({"json": {"photo": "??"}}, (400, "bad_base64")),
        ({"json": {"photo": "ä"}}, (400, "bad_base64")),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, (400, "bad_json")),
        (
            {"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}},
            (400, "bad_json"),
        ),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, (415, "content_type")),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, (400, "bad_form")),
        (
            {"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
            (400, "bad_form"),
        ),
        (
            {"content": jpeg(photo(1))[:-100], "headers": {"Content-Type": "image/jpeg"}},
            (400, "broken_photo"),
        ),
        ({"content": b"", "headers": {"Content-Type": "image/png"}}, (400, "no_photo")),
    ],
)
def test_requests_without_a_photo_are_client_errors(client, request_, wanted):
    assert status_and_code(client.post("/v1/recognize", **request_)) == wanted


@pytest.mark.parametrize(
    "params", [{"k": 0}, {"k": 1000}, {"k": "x"}, {"similar": -1}, {"category": "x" * 2000}]
)
def test_parameters_outside_their_range(client, params):
    assert status_and_code(post_photo(client, 1, **params)) == (422, "bad_parameter")


def test_unknown_methods_and_paths(client):
    assert status_and_code(client.get("/v1/recognize")) == (405, "method_not_allowed")
    assert status_and_code(client.get("/../../etc/passwd")) == (404, "not_found")
    assert status_and_code(client.get("/%2e%2e/app.py")) == (404, "not_found")
    assert client.get("/page.js").status_code == 200
    assert client.get("/").text.startswith("<!doctype html>")


def test_limits_on_bytes(index):
    limits = PhotoLimits(bytes=3_000, pixels=10_000)
    with testclient.TestClient(create_app(settings(index, limits=limits))) as client:
        assert post_photo(client, 1).status_code == 200
        large = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
        assert status_and_code(
            client.post("/v1/recognize", files={"photo": jpeg(large, "BMP")})
        ) == (
            413,
            "too_large",
        )
        body = jpeg(large, "PNG")[:4_000]
        assert (
            status_and_code(
                client.post("/v1/recognize", content=body, headers={"Content-Type": "image/png"})
            )[0]
            == 413
        )

        def endless():
            for _ in range(1000):
                yield b"\0" * 1000

        response = client.post(
            "/v1/recognize", content=endless(), headers={"Content-Type": "image/png"}
        )
        assert status_and_code(response) == (413, "too_large")
        wide = jpeg(np.zeros((101, 101, 3), np.uint8))
        assert status_and_code(client.post("/v1/recognize", files={"photo": wide})) == (
            413,
            "too_many_pixels",
        )


def test_api_keys_are_required(index, tmp_path):
    path = tmp_path / "keys"
    key = add_api_key(path, "shop")
    with testclient.TestClient(create_app(settings(index, keys=str(path)))) as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": key},
            {"Authorization": f"Basic {key}"},
        ):
            response = client.post(
                "/v1/recognize", files={"photo": jpeg(photo(1))}, headers=headers
            )
            assert status_and_code(response) == (401, "no_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert [
            client.get(p).status_code for p in ("/metrics", "/v1/products/sku-1", "/openapi.json")
        ] == [401] * 3
        assert [client.get(p).status_code for p in ("/healthz", "/readyz", "/")] == [200] * 3
        right = {"Authorization": f"Bearer {key}"}
        assert client.get("/v1/products/sku-1", headers=right).status_code == 200


def test_events_are_stored_once(client, index):
    event = {
        "event_id": "e", "request_id": "r", "time": 1e9, "visitor": "v", "variant": "a",
        "kind": "impression", "shown": [sku(1)],
    }  # fmt: skip
    assert client.post("/v1/events", json=[event]).json() == {"received": 1, "new": 1}
    assert client.post("/v1/events", json=[event, {**event, "event_id": "f"}]).json() == {
        "received": 2,
        "new": 1,
    }
    bad = client.post("/v1/events", json=[{**event, "event_id": "g"}, {**event, "kind": "look"}])
    assert status_and_code(bad) == (422, "bad_input")
    assert "event 1: kind='look'" in bad.json()["error"]["message"]
    assert (
        client.post("/v1/events", json=[{**event, "event_id": "g"}]).json()["new"] == 1
    )  # none was stored before
    for body in (b"x", b"{}", b"[1]", b"[" * 100_000, b'[{"event_id": "\\ud800"}]'):
        assert client.post("/v1/events", content=body).status_code in (400, 422)


def test_a_service_without_events_says_so(index):
    with testclient.TestClient(create_app(settings(index))) as client:
        assert status_and_code(client.post("/v1/events", json=[])) == (404, "not_found")


def test_query_photos_are_stored_only_when_enabled(index, tmp_path):
    data = jpeg(photo(1, 99))
    with testclient.TestClient(
        create_app(settings(index, keep_queries=str(tmp_path / "kept")))
    ) as client:
        answer = client.post("/v1/recognize", files={"photo": data}).json()
        client.post("/v1/recognize", files={"photo": b"no photo"})
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name.startswith(answer["request_id"])
    assert kept.read_bytes() == data


def test_the_log_has_ids_and_neither_photos_nor_skus(client, caplog):
    with caplog.at_level(logging.INFO, "sicot"):
        response = post_photo(client, 1)
        client.get(f"/v1/products/{sku(1)}")
    assert response.json()["request_id"] in caplog.text
    assert "POST /v1/recognize 200" in caplog.text
    assert sku(1) not in caplog.text
    assert "JFIF" not in caplog.text


def test_a_valid_request_id_is_used(client):
    assert (
        client.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    )
    odd = client.get("/healthz", headers={"X-Request-Id": "a b"}).headers["x-request-id"]
    assert odd != "a b"
    assert len(odd) == 16


def test_metrics_and_readiness(client):
    post_photo(client, 1)
    ready = client.get("/readyz").json()
    assert (ready["products"], ready["photos"], ready["engine"]) == (
        PRODUCTS,
        PRODUCTS * PHOTOS,
        "jax",
    )
    assert set(ready["milliseconds"]) == {"1", "2"}
    text = client.get("/metrics").text
    assert 'sicot_requests_total{route="/v1/recognize",status="200"}' in text
    assert 'sicot_stage_seconds_count{stage="engine"}' in text


def test_not_ready_until_the_model_is_loaded(index):
    client = testclient.TestClient(
        create_app(settings(index))
    )  # not entered: its start has not run
    assert status_and_code(client.get("/readyz")) == (503, "error")
    response = post_photo(client, 1)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert client.get("/healthz").status_code == 200


def test_an_engine_error_reveals_nothing(client, monkeypatch, caplog):
    def failing(photos):
        raise RuntimeError("secret path /srv/model")

    monkeypatch.setattr(client.app.state.service.models.current.batcher, "engine", failing)
    response = post_photo(client, 1)
    assert status_and_code(response) == (500, "internal")
    assert "secret" not in response.text
    assert "secret path" in caplog.text
    assert response.json()["error"]["request_id"] in caplog.text


def test_a_request_times_out(index, monkeypatch):
    with testclient.TestClient(create_app(settings(index, timeout_seconds=0.2))) as client:
        batcher = client.app.state.service.models.current.batcher
        engine = batcher.engine
        monkeypatch.setattr(batcher, "engine", lambda photos: time.sleep(0.5) or engine(photos))
        response = post_photo(client, 1)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "0.2 seconds" in response.json()["error"]["message"]
        monkeypatch.setattr(batcher, "engine", engine)
        time.sleep(0.6)
        assert post_photo(client, 1).status_code == 200


def test_a_busy_service_refuses_at_once(index, monkeypatch):
    """With more photos pending than the engine processes within the maximum wait."""
    with testclient.TestClient(create_app(settings(index))) as client:
        client.app.state.service.admission.pending = 10**6
        response = post_photo(client, 1)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        client.app.state.service.admission.pending = 0
        assert post_photo(client, 1).status_code == 200


def test_changes_of_the_index_are_followed(client, index):
    remove_products(index, [sku(1)])
    wait_until(lambda: client.get("/readyz").json()["products"] == PRODUCTS - 1)
    wait_until(lambda: post_photo(client, 1).json()["similar"][0]["sku"] != sku(1))
    assert client.get(f"/v1/products/{sku(1)}").status_code == 404
    assert sku(1) not in json.dumps(post_photo(client, 1, k=100).json())


def test_the_next_version_keeps_the_engine_of_the_same_model(client, index, small_version):
    before = client.app.state.service.models.current
    publish_copy(index, small_version)
    wait_until(lambda: client.get("/readyz").json()["index"] == "v000002")
    assert client.app.state.service.models.current.batcher is before.batcher
    assert post_photo(client, 1).json()["products"][0]["sku"] == sku(1)


def test_an_unreadable_version_keeps_the_old_one(client, index, small_version, caplog):
    version = publish_copy(index, small_version)
    wait_until(lambda: client.get("/readyz").json()["index"] == "v000002")
    (version.parent / "v000003").mkdir()
    with caplog.at_level(logging.ERROR, "sicot"):
        (index / "current").write_text("v000003\n")
        wait_until(lambda: "index not reloaded, v000002 stays" in caplog.text)
        time.sleep(0.3)
    assert caplog.text.count("index not reloaded") == 1  # and is tried again after a minute
    assert post_photo(client, 1).json()["index"] == "v000002"
    (index / "current").write_text("v000002\n")


def test_the_specification_has_every_route(client):
    spec = client.get("/openapi.json").json()
    assert {
        "/v1/recognize",
        "/v1/search",
        "/v1/products/{sku}",
        "/v1/events",
        "/readyz",
        "/metrics",
    } <= set(spec["paths"])
    recognize = spec["paths"]["/v1/recognize"]["post"]
    assert "example" in recognize["responses"]["200"]["content"]["application/json"]
    assert {"400", "401", "413", "415", "503"} <= set(recognize["responses"])
    for path in ("/v1/recognize", "/v1/search"):
        (box,) = (p for p in spec["paths"][path]["post"]["parameters"] if p["name"] == "box")
        assert "left,top,right,bottom" in box["description"]
        assert not box["required"]
    assert {"box", "box_given"} <= set(
        recognize["responses"]["200"]["content"]["application/json"]["example"]
    )
    assert set(recognize["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/json",
        "image/*",
    }


def test_settings_that_cannot_be_served(index, tmp_path):
    with pytest.raises(InputError, match="no product index there"):
        ServiceSettings(index=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="timeout_seconds=0, wanted more than 0"):
        ServiceSettings(index=str(index), timeout_seconds=0)
    with pytest.raises(InputError, match="root_path='find', wanted a path such as /find"):
        ServiceSettings(index=str(index), root_path="find")
    with pytest.raises(InputError, match="engine 'torch', wanted auto, onnx or jax"):
        load_serving_model(settings(index, engine="torch"))
    with pytest.raises(InputError, match="holds no ONNX graph"):
        load_serving_model(settings(index, engine="onnx"))
