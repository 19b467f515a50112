"""The page in a headless browser, on a wide screen and on a phone's."""

import contextlib
import json
import shutil
import threading
import time

import numpy as np
import pytest
from helpers.made_photos import jpeg, photo, sku
from helpers.service_process import free_port, serving
from helpers.small_index import PRODUCTS, record_visits

from sicot_jax.indexing import fit_ranker
from sicot_jax.serve.api_keys import add_api_key
from sicot_jax.serve.settings import ServiceSettings

pytestmark = pytest.mark.browser
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-component-update",
)
FLAGS += ("--disable-background-networking", "--disable-sync")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium here: install chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def text(browser, selector):
    return browser.find_element("css selector", selector).text


def eventually(check, seconds=20.0):
    end = time.monotonic() + seconds
    while not (result := check()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return result


def choose(browser, path):
    """What the status says after the photo was chosen."""
    browser.execute_script("document.getElementById('status').textContent = ''")
    browser.find_element("id", "file").send_keys(str(path))
    return eventually(
        lambda: (said := text(browser, "#status")) not in ("", "Recognising…") and said
    )


@pytest.fixture
def photos(tmp_path):
    for product in range(PRODUCTS):
        (tmp_path / f"{product}.jpg").write_bytes(jpeg(photo(product, 99)))
    (tmp_path / "noise.png").write_bytes(
        jpeg(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8), "PNG")
    )
    (tmp_path / "text.jpg").write_text("no photo")
    return tmp_path


@pytest.mark.parametrize("size", [(1200, 900), (390, 800)], ids=["wide", "phone"])
def test_a_photo_is_recognised(browser, index, photos, size):
    with serving(index) as server:
        browser.set_window_size(*size)
        browser.get(f"http://127.0.0.1:{server.port}/")
        assert choose(browser, photos / "2.jpg") == f"Recognised: title {sku(2)}"
        assert sku(2) in text(browser, "#match")
        assert "% confident" in text(browser, "#match")
        others = json.loads(server.recognize((photos / "2.jpg").read_bytes())[1])["products"][1:]
        likely = [product for product in others if product["probability"] >= 0.0005]
        cards = browser.find_elements("css selector", "#alternatives .card")
        assert len(cards) == len(likely)  # 0.0 % is no candidate
        assert not [card for card in cards if "0.0 %" in card.text.split()]
        assert "The photo shows: kind 0" in text(browser, "#categories")
        select = browser.find_element("id", "category")
        assert select.get_attribute("value") == "kind 0"
        assert len(browser.find_elements("css selector", "#similar .card")) == PRODUCTS // 2
        select.find_element("css selector", "option[value='']").click()
        eventually(lambda: len(browser.find_elements("css selector", "#similar .card")) == PRODUCTS)
        shown = (
            "return [...document.images]"
            ".filter(i => !i.hidden && i.complete && i.naturalWidth).length"
        )
        browser.execute_script("for (const image of document.images) image.loading = 'eager'")
        eventually(lambda: browser.execute_script(shown) == PRODUCTS + len(cards) + 2)
        assert not browser.execute_script(
            "return document.documentElement.scrollWidth > innerWidth"
        )
        select.find_element("css selector", "option[value='kind 1']").click()
        eventually(
            lambda: len(browser.find_elements("css selector", "#similar .card")) == PRODUCTS // 2
        )
        assert not browser.find_element("id", "ranked").is_displayed()  # nearest first
        assert choose(browser, photos / "3.jpg") == f"Recognised: title {sku(3)}"
        assert choose(browser, photos / "text.jpg").startswith("not a photo; wanted one of JPEG")
        assert not browser.find_element("id", "result").is_displayed()
        wrong = [entry for entry in browser.get_log("browser") if "415" not in entry["message"]]
        assert not wrong, wrong


def test_similar_products_in_the_order_of_the_ranker(browser, index, photos, tmp_path, monkeypatch):
    """And the list of the last selected category stays, whichever answer arrives last."""
    pytest.importorskip("lightgbm", reason="the ranker needs the service's extra")
    monkeypatch.setattr(fit_ranker, "MIN_CLICKED_LISTS", 20)
    events, kept = record_visits(index, tmp_path)
    fit_ranker.fit_index_ranker(index, [events], kept)
    with serving(index) as server:
        browser.get(f"http://127.0.0.1:{server.port}/")
        choose(browser, photos / "2.jpg")
        assert browser.find_element("id", "ranked").is_displayed()
        first = "return document.querySelector('#similar .card').textContent"
        assert sku(4) in browser.execute_script(
            first
        )  # the good one of its kind, before the queried one
        browser.execute_script("""
            const before = sendPhoto, later = [];
            sendPhoto = async (path) => {
              const answer = await before(path);
              // The first answer arrives last.
              if (path.includes("kind%200")) await new Promise((done) => later.push(done));
              return answer;
            };
            window.late = () => later.forEach((done) => done());
        """)
        select = browser.find_element("id", "category")
        select.find_element("css selector", "option[value='']").click()
        select.find_element("css selector", "option[value='kind 0']").click()
        select.find_element("css selector", "option[value='']").click()
        count = "return document.querySelectorAll('#similar .card').length"
        eventually(lambda: browser.execute_script(count) == PRODUCTS)
        browser.execute_script("late()")
        time.sleep(0.3)
        assert browser.execute_script(count) == PRODUCTS


def test_a_rejected_photo(browser, index, photos):
    with serving(index) as server:
        browser.get(f"http://127.0.0.1:{server.port}/")
        assert choose(browser, photos / "noise.png") == "Not in our catalogue."
        assert "Not in our catalogue" in text(browser, "#match h2")


def test_by_keyboard(browser, index, photos):
    """The field is reached by the first Tab, and opens the choice by Enter and by Space."""
    from selenium.webdriver.common.keys import Keys

    with serving(index) as server:
        browser.get(f"http://127.0.0.1:{server.port}/")
        browser.execute_script(
            "window.clicks = 0;"
            "file.addEventListener('click', e => { e.preventDefault(); clicks += 1; })"
        )
        browser.find_element("tag name", "body").send_keys(Keys.TAB)
        assert browser.switch_to.active_element.get_attribute("id") == "drop"
        for key in (Keys.ENTER, Keys.SPACE):
            browser.switch_to.active_element.send_keys(key)
        assert browser.execute_script("return clicks") == 2


def test_with_a_key(browser, index, photos, tmp_path):
    """It is requested when it is needed; pictures come with it too."""
    key = add_api_key(tmp_path / "keys", "page")
    with serving(index, "--keys", str(tmp_path / "keys")) as server:
        browser.get(f"http://127.0.0.1:{server.port}/")
        assert "wanted an API key" in choose(browser, photos / "1.jpg")
        field = browser.switch_to.active_element
        assert field.get_attribute("id") == "key"
        field.send_keys(key + "\n")
        browser.execute_script("document.getElementById('key').dispatchEvent(new Event('change'))")
        eventually(lambda: text(browser, "#status") == f"Recognised: title {sku(1)}")
        shown = (
            "const i = document.querySelector('#match img'); return !i.hidden && i.naturalWidth > 0"
        )
        eventually(lambda: browser.execute_script(shown))


@contextlib.contextmanager
def service_with_box(index, box):
    """Yields the address of a service whose engine predicts `box` in every photo."""
    import uvicorn

    from sicot_jax.serve.app import create_app

    app, port = (
        create_app(ServiceSettings(index=str(index), engine="jax", max_batch=1)),
        free_port(),
    )
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        state = eventually(lambda: server.started and app.state.service)
        batcher = state.models.current.batcher
        engine = batcher.engine
        batcher.engine = lambda photos: engine(photos)._replace(
            box=box and np.array([box] * len(photos))
        )
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def two(tmp_path):
    """A photo of two products side by side; the recogniser sees the middle half of it."""
    path = tmp_path / "two.png"
    path.write_bytes(jpeg(np.concatenate([photo(1, 99), photo(4, 99)], 1), "PNG"))
    return path


def drawn(browser):
    """The box on the screen, as fractions of the photo; None where there is none."""
    return browser.execute_script("""
      const [a, b] = ["query", "box"].map((id) => document.getElementById(id).getBoundingClientRect());
      return b.width ? [(b.left - a.left) / a.width, (b.top - a.top) / a.height, (b.right - a.left) / a.width, (b.bottom - a.top) / a.height] : null;
    """)  # noqa: E501


def requested_boxes(browser):
    """The boxes of all requests so far, None for those without."""
    addresses = browser.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    return [
        [float(side) for side in address.partition("&box=")[2].split(",")]
        if "&box=" in address
        else None
        for address in addresses
        if "/v1/recognize" in address
    ]


def assert_requested(browser, *boxes):
    """These and no others; the browser lists a request a moment after its answer."""
    eventually(lambda: len(requested_boxes(browser)) >= len(boxes))
    assert requested_boxes(browser) == list(boxes)


def recognised(browser, product):
    eventually(lambda: text(browser, "#status") == f"Recognised: title {sku(product)}")


@pytest.mark.parametrize("size", [(1200, 900), (390, 800)], ids=["wide", "phone"])
def test_the_box_is_drawn_and_dragged(browser, index, two, size):
    """The model's box spans half of either product; the person moves it over one of them, then over
    the other.
    """
    from selenium.webdriver import ActionChains

    with service_with_box(index, [0.0, 0.0, 1.0, 1.0]) as address:
        browser.set_window_size(*size)
        browser.get_log("browser")  # of the tests before
        browser.get(address)
        choose(browser, two)
        assert drawn(browser) == pytest.approx([0.25, 0, 0.75, 1], abs=0.01)
        assert_requested(browser, None)
        assert not browser.find_element("id", "reset-box").is_enabled()
        move, width = (
            browser.find_element("css selector", "#box button"),
            browser.find_element("id", "query").size["width"],
        )
        location = browser.find_element("id", "answer").location
        ActionChains(browser).click_and_hold(move).move_by_offset(
            -round(0.3 * width), 0
        ).release().perform()
        recognised(browser, 1)
        assert drawn(browser) == pytest.approx([0, 0, 0.5, 1], abs=0.01)
        assert_requested(browser, None, [0, 0, 0.5, 1])
        ActionChains(browser).click_and_hold(move).move_by_offset(
            round(0.55 * width), 0
        ).release().perform()
        recognised(browser, 4)
        assert_requested(browser, None, [0, 0, 0.5, 1], [0.5, 0, 1, 1])
        assert sku(4) in text(browser, "#match")
        assert sku(4) in text(browser, "#similar .card")
        corner = browser.find_element("css selector", "#box [data-sides='left bottom']")
        ActionChains(browser).click_and_hold(corner).move_by_offset(
            round(0.1 * width), -40
        ).release().perform()
        left, top, right, bottom = eventually(lambda: requested_boxes(browser)[3:])[0]
        assert left == pytest.approx(0.6, abs=0.01)
        assert (top, right) == (0, 1)
        assert 0.3 < bottom < 0.9
        assert browser.find_element("id", "answer").location == location  # nothing jumps
        browser.find_element("id", "reset-box").click()
        eventually(
            lambda: (
                len(requested_boxes(browser)) == 5
                and not browser.find_element("id", "reset-box").is_enabled()
            )
        )
        assert drawn(browser) == pytest.approx([0.25, 0, 0.75, 1], abs=0.01)
        assert requested_boxes(browser)[-1] is None
        assert not browser.get_log("browser")


def test_the_box_by_keyboard(browser, index, two):
    """Arrow keys move it, and pull a corner; several at once are one search."""
    from selenium.webdriver.common.keys import Keys

    with service_with_box(index, [0.0, 0.0, 1.0, 1.0]) as address:
        browser.set_window_size(1200, 900)
        browser.get(address)
        choose(browser, two)
        move, corner = browser.find_elements("css selector", "#box button")[:2]
        move.send_keys(Keys.SHIFT, *[Keys.ARROW_LEFT] * 5)
        recognised(browser, 1)
        assert_requested(browser, None, [0, 0, 0.5, 1])
        assert drawn(browser) == pytest.approx([0, 0, 0.5, 1], abs=0.01)
        assert browser.switch_to.active_element == move
        assert all(b.accessible_name for b in (move, corner))
        move.send_keys(Keys.TAB)
        assert browser.switch_to.active_element == corner
        corner.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
        assert_requested(browser, None, [0, 0, 0.5, 1], [0.02, 0.02, 0.5, 1])


def test_a_part_is_selected_where_the_model_predicts_none(browser, index, two):
    """Drawn by the mouse; by a button, for keyboard and finger; and back to the full photo."""
    from selenium.webdriver import ActionChains

    with service_with_box(index, None) as address:
        browser.set_window_size(1200, 900)
        browser.get(address)
        choose(browser, two)
        assert drawn(browser) is None
        query = browser.find_element("id", "query")
        half = query.size["width"] // 2
        pull = (
            ActionChains(browser).move_to_element_with_offset(query, 1 - half, -60).click_and_hold()
        )
        pull.move_by_offset(half, 120).release().perform()
        eventually(lambda: len(requested_boxes(browser)) == 2)
        ((left, top, right, bottom),) = requested_boxes(browser)[1:]
        assert left < 0.02
        assert right == pytest.approx(0.5, abs=0.01)
        assert 0 < top < 0.3 < bottom < 1
        browser.find_element("id", "reset-box").click()
        eventually(lambda: len(requested_boxes(browser)) == 3 and drawn(browser) is None)
        browser.find_element("id", "select-box").click()
        eventually(lambda: requested_boxes(browser)[3:] == [[0.2, 0.2, 0.8, 0.8]])
        ActionChains(browser).move_to_element(query).click().perform()  # a click changes nothing
        assert drawn(browser) == pytest.approx([0.2, 0.2, 0.8, 0.8], abs=0.01)
        assert len(requested_boxes(browser)) == 4


def test_the_box_by_finger(browser, index, two):
    with service_with_box(index, [0.0, 0.0, 1.0, 1.0]) as address:
        browser.set_window_size(390, 800)
        browser.get(address)
        choose(browser, two)
        x, y = browser.execute_script("""
          const r = document.getElementById("box").getBoundingClientRect();
          return [r.left + r.width / 2, r.top + r.height / 2];
        """)

        def touch(kind, *points):
            browser.execute_cdp_cmd(
                "Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)}
            )

        touch("touchStart", {"x": x, "y": y})
        for step in range(1, 11):
            touch("touchMove", {"x": x + 20 * step, "y": y})
        touch("touchEnd")
        recognised(browser, 4)
        assert_requested(browser, None, [0.5, 0, 1, 1])
