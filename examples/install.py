"""The cell with which every notebook begins: it does nothing where jopt is installed."""

import glob
import importlib.util
import subprocess
import sys


def install(package, otherwise):
    """Without dependencies, so that Colab's own jax, its compilers and torch stay."""
    if subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", package]).returncode:
        raise SystemExit(otherwise)


if importlib.util.find_spec("jopt") is None:
    wheels = glob.glob("jopt-*.whl") + glob.glob("/content/drive/MyDrive/**/jopt-*.whl", recursive=True)
    install(
        wheels[0] if wheels else "jopt", "Put jopt's wheel, jopt-*.whl, beside this notebook, and run this cell again."
    )
if importlib.util.find_spec("optax") is None:
    install("optax", "optax could not be installed.")
