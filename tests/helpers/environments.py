"""Environments with only some of the packages that are installed here."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(extras: Sequence[str] = ()) -> list[Requirement]:
    """Returns what pyproject.toml asks for, with some of its extras."""
    named = [PROJECT["optional-dependencies"][extra] for extra in extras]
    return [Requirement(text) for texts in (PROJECT["dependencies"], *named) for text in texts]


def make_environment(folder: Path, extras: Sequence[str] = ()) -> Path:
    """Makes an environment of what an installation with some extras brings, and the checkout.

    Files are links to those of the environment that runs the tests, so nothing is downloaded.

    Returns:
      Its Python.
    """
    venv.create(folder, with_pip=False)
    packages = Path(
        sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    )
    for distribution in _closure(requirements(extras)):
        for file in distribution.files or ():
            if ".." not in file.parts:
                link = packages / file
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(file.locate())
    (packages / "checkout.pth").write_text(f"{ROOT}\n")
    return folder / "bin" / "python"


def _closure(wanted: Iterable[Requirement]) -> list[importlib.metadata.Distribution]:
    """Returns the distributions that requirements need, directly or through others."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen, left = set(), list(wanted)
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            found[name] = importlib.metadata.distribution(name)
            needed = map(Requirement, found[name].requires or ())
            left += [one for one in needed if _applies(one, extra)]
    return list(found.values())


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def run_sicot(python: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the `sicot` command of an environment in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, "-m", "sicot_jax.cli", *map(str, arguments)],
        cwd=folder,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def install(folder: Path, *arguments: object) -> Path:
    """Makes an environment with pip from a package registry; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check"]
    subprocess.run([python, "-m", "pip", "install", *options, *map(str, arguments)], check=True)
    return python
