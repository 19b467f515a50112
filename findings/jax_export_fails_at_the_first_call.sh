#!/usr/bin/env bash
# jax 0.10.2 reads a program that jax 0.12.0.1 exported without complaint: `jax.export.deserialize`
# returns it with its shapes and platforms. Only its first call fails, with "Failed to deserialize
# StableHLO". The serialised form holds no version of jax, so a reader cannot tell beforehand.
# (The other direction, an older program under a newer jax, works.)
#
# Output seen:
#   written by jax 0.12.0.1
#   jax 0.10.2: deserialised, platforms ('cpu',)
#   jax 0.10.2: the call fails: JaxRuntimeError: INVALID_ARGUMENT: Failed to deserialize StableHLO
# PYTHON names a Python of 3.12 or newer, which jax 0.12 needs (default: python3).
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
for version in 0.12.0.1 0.10.2; do
  "${PYTHON:-python3}" -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check \
    "jax==$version" "jaxlib==$version" flatbuffers==25.12.19
done
export JAX_PLATFORMS=cpu
"$work/0.12.0.1/bin/python" - "$work/program" <<'P'
import sys, jax, jax.numpy as jnp
from jax import export
shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 8"), jnp.float32)
program = export.export(jax.jit(lambda x: jnp.tanh(x @ x.T).sum(1)))(shape)
open(sys.argv[1], "wb").write(program.serialize())
print("written by jax", jax.__version__)
P
"$work/0.10.2/bin/python" - "$work/program" <<'P'
import sys, jax, numpy as np
from jax import export
program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
print(f"jax {jax.__version__}: deserialised, platforms {program.platforms}")
try:
    program.call(np.ones((3, 8), np.float32))
except jax.errors.JaxRuntimeError as error:
    print(f"jax {jax.__version__}: the call fails: JaxRuntimeError: {error}")
    assert "Failed to deserialize StableHLO" in str(error)
else:
    sys.exit("the call works now")
P
