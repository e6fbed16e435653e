#!/usr/bin/env bash
# Test the lower bounds of pyproject.toml and the newest releases: with torch on Python 3.11, jopt alone on 3.12 and
# 3.13. A Python that is not installed is an error; name the ones to run in VERSIONS.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3.11} TORCH=${TORCH:-torch==2.13.0}
VERSIONS=${VERSIONS:-oldest newest 3.12 3.13}
bounds=(jax==0.8.0 jaxlib==0.8.0 optax==0.2.6 numpy==2.0.0)

run() { # name, python, what to install, what to test
  local venv=".venv-$1"
  echo "== $1"
  [ -x "$venv/bin/python" ] || "$2" -m venv "$venv"
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install -q $3
  "$venv/bin/python" -c 'import jax, optax, numpy, sys; print(sys.version.split()[0], "jax", jax.__version__, "optax", optax.__version__, "numpy", numpy.__version__)'
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pytest -q -n 2 -m "not slow" $4
}

for version in $VERSIONS; do
  case $version in
    oldest) run oldest "$PYTHON" "$TORCH ${bounds[*]} -e .[test]" "" ;;
    newest) run newest "$PYTHON" "$TORCH -U jax jaxlib optax -e .[test]" "" ;;
    *) run "$version" "python$version" "pytest pytest-xdist -U jax jaxlib optax -e ." "tests/test_transform.py tests/test_arena.py tests/test_numerics.py tests/test_import.py tests/test_references.py tests/test_docs.py jopt" ;;
  esac
done
