"""The page in a headless browser, on a wide screen and on a phone's."""

import shutil
import time

import numpy as np
import pytest
from index_maker import PRODUCTS, jpeg, photo, sku
from test_server import serving

from sicot_jax.serve.keys import add_key

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


def text(browser, place):
    return browser.find_element("css selector", place).text


def eventually(check, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def choose(browser, path):
    """What the status says after the photo was chosen."""
    browser.execute_script("document.getElementById('status').textContent = ''")
    browser.find_element("id", "file").send_keys(str(path))
    return eventually(lambda: (said := text(browser, "#status")) not in ("", "Looking…") and said)


@pytest.fixture
def photos(tmp_path):
    for product in range(PRODUCTS):
        (tmp_path / f"{product}.jpg").write_bytes(jpeg(photo(product, 99)))
    (tmp_path / "noise.png").write_bytes(jpeg(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8), "PNG"))
    (tmp_path / "text.jpg").write_text("no photo")
    return tmp_path


@pytest.mark.parametrize("size", [(1200, 900), (390, 800)], ids=["wide", "phone"])
def test_a_photo_is_recognised(browser, index, photos, size):
    with serving(index) as server:
        browser.set_window_size(*size)
        browser.get(f"http://127.0.0.1:{server.port}/")
        assert choose(browser, photos / "2.jpg") == f"Recognised: title {sku(2)}"
        assert sku(2) in text(browser, "#top") and "% sure" in text(browser, "#top")
        assert len(browser.find_elements("css selector", "#others .card")) == PRODUCTS - 1
        assert "The photo shows: kind 0" in text(browser, "#kind")
        select = browser.find_element("id", "category")
        assert select.get_attribute("value") == "kind 0"
        assert len(browser.find_elements("css selector", "#similar .card")) == PRODUCTS // 2
        select.find_element("css selector", "option[value='']").click()
        eventually(lambda: len(browser.find_elements("css selector", "#similar .card")) == PRODUCTS)
        shown = "return [...document.images].filter(i => !i.hidden && i.complete && i.naturalWidth).length"
        browser.execute_script("for (const image of document.images) image.loading = 'eager'")
        eventually(lambda: browser.execute_script(shown) == 2 * PRODUCTS + 1)
        assert not browser.execute_script("return document.documentElement.scrollWidth > innerWidth")
        select.find_element("css selector", "option[value='kind 1']").click()
        eventually(lambda: len(browser.find_elements("css selector", "#similar .card")) == PRODUCTS // 2)
        assert choose(browser, photos / "3.jpg") == f"Recognised: title {sku(3)}"
        assert choose(browser, photos / "text.jpg").startswith("not a photo; wanted one of JPEG")
        assert not browser.find_element("id", "result").is_displayed()
        wrong = [entry for entry in browser.get_log("browser") if "415" not in entry["message"]]
        assert not wrong, wrong


def test_what_is_not_in_the_catalogue(browser, index, photos):
    with serving(index) as server:
        browser.get(f"http://127.0.0.1:{server.port}/")
        assert choose(browser, photos / "noise.png") == "Not in our catalogue."
        assert "Not in our catalogue" in text(browser, "#top h2")


def test_by_keyboard(browser, index, photos):
    """The field is reached by the first Tab, and opens the choice by Enter and by Space."""
    from selenium.webdriver.common.keys import Keys

    with serving(index) as server:
        browser.get(f"http://127.0.0.1:{server.port}/")
        browser.execute_script(
            "window.clicks = 0; file.addEventListener('click', e => { e.preventDefault(); clicks += 1; })"
        )
        browser.find_element("tag name", "body").send_keys(Keys.TAB)
        assert browser.switch_to.active_element.get_attribute("id") == "drop"
        for key in (Keys.ENTER, Keys.SPACE):
            browser.switch_to.active_element.send_keys(key)
        assert browser.execute_script("return clicks") == 2


def test_with_a_key(browser, index, photos, tmp_path):
    """It is asked for when it is needed; pictures come with it too."""
    key = add_key(tmp_path / "keys", "page")
    with serving(index, "--keys", str(tmp_path / "keys")) as server:
        browser.get(f"http://127.0.0.1:{server.port}/")
        assert "wanted an API key" in choose(browser, photos / "1.jpg")
        field = browser.switch_to.active_element
        assert field.get_attribute("id") == "key"
        field.send_keys(key + "\n")
        browser.execute_script("document.getElementById('key').dispatchEvent(new Event('change'))")
        eventually(lambda: text(browser, "#status") == f"Recognised: title {sku(1)}")
        shown = "const i = document.querySelector('#top img'); return !i.hidden && i.naturalWidth > 0"
        eventually(lambda: browser.execute_script(shown))
