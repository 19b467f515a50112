"""Catalogues are read without jax: a worker process that loads photos must not start it."""

import pkgutil
import subprocess
import sys

import sicot_jax.catalog


def test_no_module_of_the_catalogue_imports_jax():
    names = [
        module.name
        for module in pkgutil.walk_packages(sicot_jax.catalog.__path__, "sicot_jax.catalog.")
    ]
    assert "sicot_jax.catalog.batches" in names
    code = "import importlib, sys\n" + "".join(f"importlib.import_module({n!r})\n" for n in names)
    code += "assert not {'jax', 'torch'} & set(sys.modules), sorted(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True)
