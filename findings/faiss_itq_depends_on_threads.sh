#!/usr/bin/env bash
# faiss-cpu 1.15.1: the rotation that faiss.ITQTransform learns depends on the number of OpenMP
# threads, from 128 bits on. The same vectors and seed give other binary codes on a machine with
# other cores; 64 bits give the same. An index built twice is then not the same index.
#
# Output seen (two cores):
#   64 bits: equal codes with 1 and 2 threads: True
#   128 bits: equal codes with 1 and 2 threads: False
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check faiss-cpu==1.15.1 numpy==2.4.6
cat > "$work/codes.py" <<'P'
import sys
import faiss
import numpy as np

bits, threads = int(sys.argv[1]), int(sys.argv[2])
faiss.omp_set_num_threads(threads)
x = np.random.default_rng(0).normal(size=(5000, 128)).astype(np.float32)
x /= np.linalg.norm(x, axis=1, keepdims=True)
itq = faiss.ITQTransform(128, bits, bits < 128)
itq.train(x)
sys.stdout.buffer.write(np.packbits(itq.apply(x) > 0, axis=1).tobytes())
P
result() {
  for threads in 1 2; do
    "$work/venv/bin/python" "$work/codes.py" "$1" "$threads" > "$work/codes.$1.$threads"
  done
  equal=True; cmp -s "$work/codes.$1.1" "$work/codes.$1.2" || equal=False
  echo "$1 bits: equal codes with 1 and 2 threads: $equal"
}
[ "$(result 64)" = "64 bits: equal codes with 1 and 2 threads: True" ]
[ "$(result 128)" = "128 bits: equal codes with 1 and 2 threads: False" ]
echo "as described"
