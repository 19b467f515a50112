#!/usr/bin/env bash
# safetensors 0.8.0, framework="numpy": whether a bfloat16 tensor can be read depends on whether
# anything in the process has imported ml_dtypes, which gives numpy the type's name; safetensors does
# not import it. float8 tensors fail in both cases, with an AttributeError about numpy: their type is
# looked up as an attribute of numpy, where ml_dtypes does not put it.
#
# Output seen:
#   BF16 alone: TypeError: data type 'bfloat16' not understood
#   BF16 after import ml_dtypes: [1.5 -2]
#   F8_E4M3 after import ml_dtypes: AttributeError: module 'numpy' has no attribute 'float8_e4m3fn'
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  safetensors==0.8.0 numpy==2.4.6 ml-dtypes==0.6.0
read_tensor() { "$work/venv/bin/python" - "$work/$1" "$1" "$2" <<'P'
import json, struct, sys
data = {"BF16": b"\xc0\x3f\x00\xc0", "F8_E4M3": b"\x3c\xc0"}[sys.argv[2]]  # 1.5 and -2
header = json.dumps(
    {"a": {"dtype": sys.argv[2], "shape": [2], "data_offsets": [0, len(data)]}}
).encode()
open(sys.argv[1], "wb").write(struct.pack("<Q", len(header)) + header + data)
exec(sys.argv[3])
import safetensors
with safetensors.safe_open(sys.argv[1], framework="numpy") as file:
    try:
        print(file.get_tensor("a"))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
P
}
alone="$(read_tensor BF16 pass)" after="$(read_tensor BF16 'import ml_dtypes')"
float8="$(read_tensor F8_E4M3 'import ml_dtypes')"
echo "BF16 alone: $alone"
echo "BF16 after import ml_dtypes: $after"
echo "F8_E4M3 after import ml_dtypes: $float8"
[[ "$alone" == TypeError* ]] && [[ "$after" == "[1.5 -2]" ]] && [[ "$float8" == AttributeError* ]]
