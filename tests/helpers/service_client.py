"""Requests to the service inside this process."""

import time

from helpers.index_maker import jpeg, photo


def ask(client, product, path="/v1/recognize", **params):
    return client.post(path, files={"photo": jpeg(photo(product, 99))}, params=params)


def error(response):
    stored = response.json()["error"]
    assert set(stored) == {"code", "message", "request_id"}
    assert "\n" not in stored["message"]
    assert stored["request_id"] == response.headers["x-request-id"]
    return response.status_code, stored["code"]


def eventually(check, seconds=10.0):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)
