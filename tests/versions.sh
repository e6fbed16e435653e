#!/usr/bin/env bash
# The suite beside other versions of JAX, torch and Python: `tests/versions.sh SET ...`, or all that `make test-versions`
# runs. Each set has an environment of its own, which is removed after it; KEEP=1 keeps it, INSTALL=1 does no more.
#
#   colab-tpu, colab-cpu   what Colab gives; torch's builds for x86-64 carry CUDA: 3 GB to download, 7 GB on disk
#   today                  Python 3.11, the CPU build of torch 2.13 and the newest JAX for it
#   newest                 the newest of all
#   next                   that, and pre-releases of JAX where pip's indexes have some
#   jax-oldest, jax-newest jopt alone, a part of its tests: what CI runs; the newest as users compile, without --quick
set -euo pipefail
cd "$(dirname "$0")/.."

colab=(jax==0.7.2 jaxlib==0.7.2 numpy==2.1.3 optax==0.2.8 flax==0.11.2 orbax-checkpoint==0.12.4 safetensors==0.8.0)
# Of jopt alone: every part, and of the optimizers those that are unlike each other.
alone=(tests/project/test_{versions,import}.py tests/jopt/around/test_groups.py
  tests/jopt/test_{numerics,arena,transform,sharding,meshes,eager,export,loops}.py jopt)
unlike="not test_transform and not test_arena or adam-amsgrad or adafactor-l2 or muon"

python_of() { # a version, as 3.13: the interpreter's path
  local found
  if "python$1" -c "" 2>/dev/null; then
    command -v "python$1"
  elif found=$(pyenv prefix "$(pyenv versions --bare 2>/dev/null | grep "^$1\." | tail -1)" 2>/dev/null); then
    echo "$found/bin/python"
  else
    echo "versions.sh: Python $1 is not installed" >&2
    return 1
  fi
}

run() { # a set's name, a Python, what to install; then what to test
  local name=$1 version=$2 packages=$3 venv=".venv-$1" python
  shift 3
  python=$(python_of "$version")
  echo "== $name"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install -q $packages
  [ -z "${INSTALL:-}" ] || return 0
  "$venv/bin/python" - <<'VERSIONS'
import importlib.metadata as metadata, platform
found = [f"Python {platform.python_version()}"]
for name in ("torch", "jax", "numpy", "optax", "flax", "orbax-checkpoint"):
    try:
        found.append(f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        pass
print(", ".join(found))
VERSIONS
  "$venv/bin/python" -m pytest -q -n 2 -p no:cacheprovider "$@" || failed+=("$name")
  if [ "$name" = colab-tpu ]; then # and Colab's compiler
    "$venv/bin/python" -m pip install -q --no-deps libtpu==0.0.21.1
    "$venv/bin/python" -m pytest -q -p no:cacheprovider tests/jopt/test_ahead_of_time.py -k colabs || failed+=("its compiler")
  fi
  [ -n "${KEEP:-}" ] || rm -rf "$venv"
}

failed=()
for set in "${@:-colab-tpu colab-cpu today newest}"; do
  for name in $set; do
    case $name in
      colab-tpu) run "$name" 3.13 "torch==2.9.0 ${colab[*]} -e .[test]" -m "not slow or notebook" ;;
      colab-cpu) run "$name" 3.13 "torch==2.11.0 ${colab[*]} -e .[test]" -m "not slow or notebook" ;;
      today) run "$name" 3.11 "torch==2.13.0 -e .[test]" -m "not slow or notebook" ;;
      newest) run "$name" 3.13 "-U torch jax jaxlib optax numpy -e .[test]" -m "not slow or notebook" ;;
      next) run "$name" 3.13 "-U torch jax>=0.0.dev0 jaxlib>=0.0.dev0 optax numpy -e .[test]" -m "not slow or notebook" ;;
      jax-oldest) run "$name" 3.11 "jax==0.7.2 jaxlib==0.7.2 optax==0.2.6 numpy==2.0.0 pytest pytest-xdist flatbuffers -e ." -m "not slow" --quick -k "$unlike" "${alone[@]}" ;;
      jax-newest) run "$name" 3.13 "-U jax jaxlib optax numpy pytest pytest-xdist flatbuffers -e ." -m "not slow" -k "$unlike" "${alone[@]}" ;;
      *) echo "versions.sh: no set $name" >&2; exit 2 ;;
    esac
  done
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
