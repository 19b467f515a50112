"""Every sub-command in an environment that has just what pyproject.toml says, and its floors."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from helpers.environments import PROJECT, ROOT, install, make_environment, requirements, run_sicot
from helpers.made_photos import jpeg, photo, sku, write_manifest_csv
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PRODUCTS, PHOTOS = 4, 6
TRAINING = (
    "--config.data.source=imported",
    "--config.data.path=catalog",
    "--config.train.batch_size=8",
    "--config.train.steps=2",
)
LOG = "event_id,request_id,time,visitor,variant,kind,query_image_id,sku,shown\n" + "".join(
    f"i{n},r{n},{1_700_000_000 + 9 * n},v{n},a,impression,q{n},,sku-0|sku-1\n"
    f"c{n},r{n},{1_700_000_001 + 9 * n},v{n},a,click,q{n},sku-1,\n"
    for n in range(3)
)
# milvus: tests/index/backends/test_milvus.py; heif: its package is not among those of the tests.
INSTALLED_ELSEWHERE = ("cuda", "tpu", "milvus", "heif")


def pins(name):
    """Returns the versions of a lock file by package, those of other Pythons left out."""
    lines = map(Requirement, (ROOT / "locks" / name).read_text().splitlines())
    return {
        canonicalize_name(line.name): str(line.specifier).removeprefix("==")
        for line in lines
        if line.marker is None or line.marker.evaluate()
    }


def extras():
    return [name for name in PROJECT["optional-dependencies"] if name not in ("docs", "test")]


def test_locks_pin_what_pyproject_asks_for():
    for wanted in requirements(["service", "events"]):
        locked = {**pins("test.txt"), **pins("runtime.txt")}
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), wanted
    core = {canonicalize_name(wanted.name) for wanted in requirements(["service"])}
    assert core <= pins("runtime.txt").keys()


def test_the_lock_of_floors_pins_the_lowest_allowed_version_of_everything():
    locked = pins("floors.txt")
    for wanted in requirements([name for name in extras() if name not in ("cuda", "tpu")]):
        (lowest,) = [one.version for one in wanted.specifier if one.operator == ">="]
        pinned = locked[canonicalize_name(wanted.name)]
        assert re.fullmatch(rf"{re.escape(lowest)}(\.0)*", pinned), (wanted, pinned)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environments by their extras, each made once."""
    made = {}

    def get(*names):
        if names not in made:
            folder = tmp_path_factory.mktemp("-".join(("environment", *names)))
            made[names] = make_environment(folder, names)
        return made[names]

    return get


@pytest.fixture(scope="module")
def shop(environment, tmp_path_factory):
    """A folder with a manifest, and a catalogue and a run made in an environment without extras."""
    folder = tmp_path_factory.mktemp("shop")
    rows, photos = [], {}
    for product in range(PRODUCTS):
        for n in range(PHOTOS):
            rows.append({"image": f"img/{product}_{n}.jpg", "sku": sku(product), "title": "a shoe"})
            photos[rows[-1]["image"]] = jpeg(photo(product, n))
    (folder / "img").mkdir()
    write_manifest_csv(folder, rows, photos)
    (folder / "log.csv").write_text(LOG)
    python = environment()
    succeed(python, folder, "import", "products.csv", "--out", "catalog", "--min-count", "1")
    succeed(python, folder, "train", "--config=tiny", *TRAINING, "--workdir=run")
    return folder


def succeed(python, folder, *command):
    done = run_sicot(python, folder, *command)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "evaluate run --workdir=run",
        "plan --config=tiny",
        "export-arrays --config=run/config.json --out=arrays.npz",
        "report runs run --out=report",
        "convert to-stablehlo --workdir=run --out=stablehlo",
        "compare --config=run/config.json --workdir=compared",
        "sweep --config=run/config.json --workdir=swept --variants baseline --rates 0.1 --seeds 0",
        "serve-key someone --file=keys",
    ],
)
def test_commands_that_need_no_extra(environment, shop, command):
    succeed(environment(), shop, *command.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("convert to-torch --workdir=run --out=out", "torch"),
        ("convert from-torch weights.safetensors --out=out", "torch"),
        ("convert to-onnx --workdir=run --out=out", "torch"),
        ("index build --workdir=run --out=out", "service"),
        (
            "index nightly --manifest=products.csv --catalog=out --workdir=run --index=out",
            "service",
        ),
        ("serve --index=catalog", "service"),
        ("index rank --index=none --events log.csv --queries=img", "service"),
        ("events import log.csv --out=out", "events"),
        ("events triplets log.csv --out=out", "events"),
    ],
)
def test_a_missing_extra_is_named_before_any_work(environment, shop, command, extra):
    done = run_sicot(environment(), shop, *command.split())
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert re.search(rf"install it: pip install 'sicot_jax\[{extra}\]'", line), line
    assert done.stdout == ""
    assert not (shop / "out").exists()


@pytest.mark.slow
def test_the_service_needs_its_extra_alone(environment, shop):
    python = environment("service")
    succeed(python, shop, "index", "build", "--workdir=run", "--out=index")
    succeed(python, shop, "index", "verify", "--index=index")
    (shop / "new.csv").write_text("sku,price\nsku-1,3\n")
    succeed(python, shop, "index", "update", "--index=index", "new.csv")
    for command, extra in (
        ("index publish --index=index --database=postgresql://localhost/none", "postgres"),
        ("index publish --index=index --database=milvus+http://localhost:1", "milvus"),
    ):
        done = run_sicot(python, shop, *command.split())
        assert f"install it: pip install 'sicot_jax[{extra}]'" in done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "sicot_jax.cli", "serve", "--index=index", f"--port={port}"]
    with subprocess.Popen(command, cwd=shop, stderr=subprocess.PIPE) as service:
        try:
            answer = when_ready(f"http://127.0.0.1:{port}/readyz", service)
        finally:
            service.terminate()
    assert (answer["engine"], answer["provider"]) == ("jax", "cpu")


def when_ready(address, service):
    for _ in range(240):
        assert service.poll() is None, service.stderr.read()
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{address} does not answer")


@pytest.mark.slow
def test_every_other_extra_suffices_for_its_commands(environment, shop):
    events = environment("events")
    succeed(events, shop, "events", "import", "log.csv", "--out=events")
    succeed(events, shop, "report", "conversion", "--events", "events")
    succeed(events, shop, "events", "triplets", "events", "--out=triplets")
    torch = environment("torch")
    succeed(torch, shop, "convert", "to-torch", "--workdir=run", "--out=in_torch")
    succeed(torch, shop, "convert", "from-torch", "in_torch", "--out=back")
    onnx = environment("torch", "onnx")
    succeed(onnx, shop, "convert", "to-onnx", "--workdir=run", "--out=graph")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "module"),
    [
        (("service", "postgres"), "sicot_jax.index.backends.postgres"),
        (("service", "ray"), "sicot_jax.serve.ray"),
    ],
)
def test_extras_that_need_a_server_are_whole(environment, names, module):
    subprocess.run([environment(*names), "-c", f"import {module}"], check=True)


def test_every_extra_has_an_environment_of_its_own():
    tested = {"service", "events", "torch", "onnx", "postgres", "ray"}
    assert set(extras()) == tested | set(INSTALLED_ELSEWHERE)


FLOOR_COMMANDS = (
    "import products.csv --out catalog --min-count 1",
    f"train --config=tiny {' '.join(TRAINING)} --workdir=run",
    "convert to-torch --workdir=run --out=in_torch --with-text",
    "convert to-stablehlo --workdir=run --out=stablehlo",
    "index build --workdir=run --out=index",  # with an ONNX graph
    "events import log.csv --out=events",
    "events triplets events --out=triplets",
)
FLOOR_TESTS = (
    "tests/weights/test_safetensors_io.py",
    "tests/test_recognizer.py",
    "tests/index/storage/test_inverted_lists.py",
    "tests/search/test_ranker.py",
    "tests/events/test_logs.py",
    "tests/serve/test_app.py::test_every_product_is_recognised",
    "tests/serve/test_app.py::test_requests_without_a_photo_are_client_errors",
)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="locks/floors.txt is for Python 3.11")
def test_the_lowest_allowed_versions_work(shop, tmp_path):
    python = install(tmp_path / "floors", "-r", ROOT / "locks" / "floors.txt")
    (packages,) = (tmp_path / "floors").glob("lib/python*/site-packages")
    (packages / "checkout.pth").write_text(f"{ROOT}\n")
    for name in ("products.csv", "log.csv", "img"):
        (tmp_path / name).symlink_to(shop / name)
    for command in FLOOR_COMMANDS:
        succeed(python, tmp_path, *command.split())
    # Old packages warn of old ways of older ones.
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", "-m", "not slow"]
    subprocess.run([python, "-m", "pytest", *options, *FLOOR_TESTS], cwd=ROOT, check=True)
