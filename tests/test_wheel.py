"""The installed package holds what a checkout has beside it: configs and data set builders."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(tmp_path):
    pytest.importorskip("setuptools", reason="building a wheel without network needs setuptools in the environment")
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"  # a build writes beside what it builds
    for name in ("sicot_jax", "configs", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    written = {path.relative_to(source) for path in source.rglob("*.py")}
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("sicot_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    inside = {path if path.parts[0] == "sicot_jax" else Path("sicot_jax", path) for path in written}
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*.py")} == inside
    for name in ("data/README.md", "data/grocery_store/README.md"):
        assert (unpacked / "sicot_jax" / name).is_file()
    (scripts,) = unpacked.glob("sicot_jax-*.dist-info/entry_points.txt")
    assert "sicot = sicot_jax.cli:main" in scripts.read_text()
    program = (
        "import sicot_jax\n"
        "from sicot_jax import config\n"
        "from sicot_jax.catalog.importing import DATA_SETS, load_builder\n"
        f"assert sicot_jax.__file__.startswith({os.fspath(unpacked)!r}), sicot_jax.__file__\n"
        "assert config.load('tiny').train.batch_size\n"
        "assert all(load_builder(name).name == name for name in DATA_SETS)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.fspath(unpacked)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
