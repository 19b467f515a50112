"""Requests to the service inside this process."""

import time

from helpers.made_photos import jpeg, photo


def post_photo(client, product, path="/v1/recognize", **params):
    """Posts a photo of a product.

    Args:
        client: TestClient of the app.
        product: product number.
        path: route.
        **params: query parameters.

    Returns:
        The response.
    """
    return client.post(path, files={"photo": jpeg(photo(product, 99))}, params=params)


def status_and_code(response):
    """Checks the format of an error response.

    Args:
        response: an error response.

    Returns:
        Its HTTP status and error code.
    """
    content = response.json()["error"]
    assert set(content) == {"code", "message", "request_id"}
    assert "\n" not in content["message"]
    assert content["request_id"] == response.headers["x-request-id"]
    return response.status_code, content["code"]


def wait_until(check, timeout_seconds=10.0):
    """Waits until a condition holds.

    Args:
        check: the condition, a function without arguments.
        timeout_seconds: fails after this time.
    """
    end = time.monotonic() + timeout_seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)
