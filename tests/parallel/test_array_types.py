"""Annotations of numpy arrays import no jax."""

import subprocess
import sys

PROGRAM = """
import sys
import sicot_jax.indexing.add, sicot_jax.indexing.update, sicot_jax.classifier.imprint
assert "jax" not in sys.modules
"""


def test_changing_an_index_imports_no_jax():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
