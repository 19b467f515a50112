#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: in a folder with [ ] in its path, saving a tree of arrays succeeds and
# writes the data, but restoring finds nothing: the parts of a checkpoint are joined by a glob of the
# unescaped path, and finding none is a warning alone.
#
# Output seen:
#   saved in 'plain': restored [0.0, 1.0, 2.0]
#   saved in 'a [2024]': no manifest.ocdbt
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat > "$work/save.py" <<'P'
import pathlib
import jax.numpy as jnp
import orbax.checkpoint as ocp

for name in ("plain", "a [2024]"):
    folder = pathlib.Path(name).absolute() / "checkpoint"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, {"x": jnp.arange(3.0)})  # no error
        if (folder / "manifest.ocdbt").exists():
            print(f"saved in {name!r}: restored {checkpointer.restore(folder)['x'].tolist()}")
        else:
            print(f"saved in {name!r}: no manifest.ocdbt")
P
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python save.py 2> errors | tee seen
diff seen - <<'T'
saved in 'plain': restored [0.0, 1.0, 2.0]
saved in 'a [2024]': no manifest.ocdbt
T
echo "as described"
