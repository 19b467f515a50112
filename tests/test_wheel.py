"""The wheel contains configs and data set builders, and trains without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import sicot_jax

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(tmp_path):
    pytest.importorskip(
        "setuptools", reason="building a wheel without network needs setuptools in the environment"
    )
    # A copy: a build writes into the folder that it builds.
    source, unpacked = tmp_path / "source", tmp_path / "unpacked"
    for name in ("sicot_jax", "configs", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    written = {path.relative_to(source) for path in source.rglob("*.py")}
    options = [
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        "--quiet",
    ]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, source], check=True
    )
    (wheel,) = tmp_path.glob("sicot_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    inside = {path if path.parts[0] == "sicot_jax" else Path("sicot_jax", path) for path in written}
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*.py")} == inside
    assert (unpacked / "sicot_jax" / "py.typed").is_file()
    for name in ("data/README.md", "data/grocery_store/README.md"):
        assert (unpacked / "sicot_jax" / name).is_file()
    (scripts,) = unpacked.glob("sicot_jax-*.dist-info/entry_points.txt")
    assert "sicot = sicot_jax.cli.main:main" in scripts.read_text()
    package = installed(wheel, tmp_path / "environment")
    program = (
        "import sicot_jax\n"
        "from sicot_jax import config\n"
        "from sicot_jax.catalog.importing.run import DATA_SETS, load_builder\n"
        f"assert sicot_jax.__file__.startswith({os.fspath(tmp_path)!r}), sicot_jax.__file__\n"
        "assert config.load_config('tiny').train.batch_size\n"
        "assert all(load_builder(name).name == name for name in DATA_SETS)\n"
    )
    # Without the checkout on the path.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run(str(package / "python"), "-c", program)
    assert run(str(package / "sicot"), "--version").split() == ["sicot_jax", sicot_jax.__version__]
    run(str(package / "sicot"), "train", "--config=tiny", "--config.train.steps=2", "--workdir=run")
    assert (
        json.loads((tmp_path / "run" / "results.json").read_text())["accuracy"]["overall"]["photos"]
        == 22
    )


def installed(wheel: Path, folder: Path) -> Path:
    """Installs the wheel into a fresh environment that sees the packages of the tests' one.

    A folder that a .pth names is searched, but the .pth files in it, an editable checkout's among
    them, are not read.
    """
    venv.create(folder, with_pip=False)
    packages = sysconfig.get_path(
        "purelib", vars={"base": os.fspath(folder), "platbase": os.fspath(folder)}
    )
    (Path(packages) / "test_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], check=True
    )
    return folder / "bin"


def test_versions_and_addresses_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {sicot_jax.__version__}" in citation
    assert f"repository-code: {project['urls']['Repository']}" in citation
    assert f"license: {project['license']}" in citation
