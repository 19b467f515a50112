#!/usr/bin/env bash
# pyarrow 26.0.1: casting whole numbers of a float64 column to text writes up to ten digits plainly
# and longer ones with an exponent. A column of barcodes that pandas made float (because of a gap)
# becomes texts of two kinds: EAN-8 as they were, EAN-13 as 4.006381333931e+12. NaN becomes the text
# "nan", which is not null.
#
# Output seen:
#   ['96385074', '1234567890', '1.2345678901e+10', '4.006381333931e+12', 'nan'] nulls: 0
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
out="$("$work/venv/bin/python" -c "
import pyarrow as pa
numbers = [96385074.0, 1234567890.0, 12345678901.0, 4006381333931.0, float('nan')]
texts = pa.array(numbers, pa.float64()).cast(pa.string())
print(texts.to_pylist(), 'nulls:', texts.null_count)")"
echo "$out"
[ "$out" = "['96385074', '1234567890', '1.2345678901e+10', '4.006381333931e+12', 'nan'] nulls: 0" ]
