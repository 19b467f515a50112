#!/usr/bin/env bash
# ./run.sh                 environment, then the main job: baseline against co-training on a small generated catalogue
# ./run.sh test [--all]    environment, then the fast tests (with --all every test)
# ./run.sh docs            environment, then the documentation, built into site/
# ./run.sh ARGS...         python -m sicot_jax.main ARGS... in that environment
# PYTHON picks the interpreter (3.11 or newer), SICOT_VENV the folder of the environment (default .venv).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${SICOT_VENV:-$root/.venv}"

find_python() {
  local candidates=(python3 python3.13 python3.12 python3.11)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  echo "run.sh: no Python 3.11 or newer as ${candidates[*]}; install one, or name it: PYTHON=/path/to/python ./run.sh" >&2
  return 2
}

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# An environment that was killed before it had pip is made again.
environment() {
  local python
  if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
  python="$(find_python)" || exit 2
  echo "making the environment in $venv" >&2
  "$python" -m venv "$venv"
}

# install KIND LOCKS...: once for each state of the lock files; a killed install is done again.
install() {
  local kind="$1"; shift
  local stamp="$venv/.installed-$kind" now
  now="$(cat "$@" "$root/pyproject.toml" | cksum)"
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$now" ] && return
  environment
  echo "installing packages ($kind), a minute or two" >&2
  local requirements=() quiet=()
  [ -t 2 ] || quiet=(--quiet)  # a person sees pip's progress, a log does not
  for lock in "$@"; do requirements+=(-r "$lock"); done
  "$venv/bin/python" -m pip install "${quiet[@]}" --disable-pip-version-check "${requirements[@]}"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e "$root"
  echo "$now" > "$stamp"
}

if [ -n "${PYTHON:-}" ] && [ -x "$venv/bin/python" ]; then
  wanted="$(find_python)" || exit 2
  wanted="$(version "$wanted")" found="$(version "$venv/bin/python")"
  if [ "$wanted" != "$found" ]; then
    echo "run.sh: $venv has Python $found, PYTHON is $wanted; remove it, or name another folder: SICOT_VENV=DIR" >&2
    exit 2
  fi
fi
install runtime "$root/locks/runtime.txt"
case "${1:-}" in
  "")
    exec "$venv/bin/python" -m sicot_jax.cli compare --config=generated --workdir="$root/runs/generated" ;;
  test)
    shift
    install test "$root/locks/runtime.txt" "$root/locks/test.txt"
    marks='not slow and not real_data and not browser and not database and not cluster'
    if [ "${1:-}" = --all ]; then shift; marks=''; fi
    cd "$root"
    # Most of a test is compiling, which takes one core, and up to 5 GiB.
    exec "$venv/bin/python" -m pytest -m "$marks" --numprocesses=auto --maxprocesses=4 --dist=worksteal "$@" ;;
  docs)
    shift
    install docs "$root/locks/runtime.txt" "$root/locks/test.txt" "$root/locks/docs.txt"
    cd "$root"
    exec env NO_MKDOCS_2_WARNING=1 "$venv/bin/python" -m mkdocs build --strict "$@" ;;
  *)
    exec "$venv/bin/python" -m sicot_jax.main "$@" ;;
esac
