#!/usr/bin/env bash
# duckdb 2.0.1: a folder called NAME=VALUE above a single file becomes a column of it, and replaces
# the file's own column of that name, for read_parquet as for read_csv with all columns given. And a
# path with a ? is a pattern also where a file of exactly that name exists: the file of the folder
# beside it is read too.
#
# Output seen:
#   x=9/e.parquet holds 1, read as [(9,)], with hive_partitioning=false as [(1,)]
#   x=9/e.csv holds 1, read as [(9,)]
#   a?b/e.parquet holds one row, read as [(1,), (2,)]
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==2.0.1
cat > "$work/read.py" <<'P'
import os
import duckdb

for folder, value in {"x=9": 1, "a?b": 1, "axb": 2}.items():
    os.mkdir(folder)
    for kind in ("parquet", "csv"):
        duckdb.execute(f"COPY (SELECT {value} AS x) TO '{folder}/e.{kind}' (FORMAT {kind})")


def rows(function):
    return sorted(duckdb.execute(f"SELECT x FROM {function}").fetchall())


plain, without = (
    rows(f"read_parquet('x=9/e.parquet'{end})") for end in ("", ", hive_partitioning=false")
)
print(f"x=9/e.parquet holds 1, read as {plain}, with hive_partitioning=false as {without}")
given = rows("read_csv('x=9/e.csv', auto_detect=false, header=true, columns={'x': 'INTEGER'})")
print(f"x=9/e.csv holds 1, read as {given}")
pattern = rows("read_parquet('a?b/e.parquet')")
print(f"a?b/e.parquet holds one row, read as {pattern}")
P
cd "$work" && venv/bin/python read.py | tee seen
diff seen - <<'T'
x=9/e.parquet holds 1, read as [(9,)], with hive_partitioning=false as [(1,)]
x=9/e.csv holds 1, read as [(9,)]
a?b/e.parquet holds one row, read as [(1,), (2,)]
T
echo "as described"
