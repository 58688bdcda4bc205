#!/usr/bin/env bash
# Creates the virtual environment $1 (default .venv) with the exact set of requirements.lock and this checkout, editable, in it.
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}
recent='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'

find_python() {  # 3.11 first: it is what requirements.lock was tested on
  for candidate in ${EQ_PYTHON:-} python3.11 python3.12 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c "$recent" >/dev/null 2>&1; then echo "$candidate"; return; fi
  done
  echo "eq needs Python >= 3.11 with the venv module; found: $(python3 --version 2>&1 | head -n 1). Install one (Debian: apt-get install python3 python3-venv) or name it: make install EQ_PYTHON=/path/to/python3.11" >&2
  return 1
}

if ! "$venv/bin/python" -c "$recent" >/dev/null 2>&1; then
  python=$(find_python)
  echo "creating $venv with $("$python" --version)"
  "$python" -m venv --clear "$venv"
fi
"$venv/bin/python" -m uv --version >/dev/null 2>&1 || "$venv/bin/python" -m pip install --quiet "uv>=0.5"
start=$SECONDS
"$venv/bin/python" -m uv pip install --quiet --compile-bytecode --python "$venv/bin/python" -r requirements.lock
"$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python" --no-deps -e .
echo "installed requirements.lock and eq into $venv in $((SECONDS - start)) s"
