#!/usr/bin/env bash
# jaxtyping 0.3.11: `from jaxtyping import Float, Int, Key` does not import jax, so that annotations
# of numpy arrays cost no start-up time; `from jaxtyping import PyTree` (or Array) imports it. One
# shared module of annotations that lists PyTree makes every numpy-only module load jax.
#
# Output seen:
#   Float, Int, Key: jax imported: False
#   PyTree: jax imported: True
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  jaxtyping==0.3.11 jax==0.10.2 jaxlib==0.10.2
imported() { "$work/venv/bin/python" -c "
import sys
from jaxtyping import $1
print('jax' in sys.modules)"; }
echo "Float, Int, Key: jax imported: $(imported 'Float, Int, Key')"
echo "PyTree: jax imported: $(imported PyTree)"
[ "$(imported 'Float, Int, Key')" = False ]
[ "$(imported PyTree)" = True ]
