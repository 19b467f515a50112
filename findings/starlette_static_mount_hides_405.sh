#!/usr/bin/env bash
# starlette 1.10.0 under FastAPI: with StaticFiles mounted at "/", a request with another
# method than a route has (GET on a POST route) is answered 404 in place of 405 with an Allow
# header: the partial match of the route loses to the full match of the mount. Clients that probe an
# API, and OpenAPI testers, take the route for missing.
#
# Output seen:
#   without a mount: 405 Allow: POST
#   with StaticFiles at /: 404 Allow: None
set -euo pipefail
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  starlette==1.10.0 fastapi==0.165.0 httpx==0.28.1
mkdir "$work/page"; echo hello > "$work/page/index.html"
cat > "$work/app.py" <<'P'
import sys
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.staticfiles import StaticFiles

for mounted in (False, True):
    app = FastAPI()
    app.post("/v1/recognize")(lambda: {})
    if mounted:
        app.mount("/", StaticFiles(directory=sys.argv[1], html=True))
    answer = TestClient(app).get("/v1/recognize")
    name = "with StaticFiles at /" if mounted else "without a mount"
    print(f"{name}: {answer.status_code} Allow: {answer.headers.get('allow')}")
P
seen="$("$work/venv/bin/python" -W ignore "$work/app.py" "$work/page")"
echo "$seen"
[ "$seen" = "without a mount: 405 Allow: POST
with StaticFiles at /: 404 Allow: None" ]
