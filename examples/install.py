"""The cell with which every notebook begins: it installs the wheel beside it, unless it has done so."""

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile


class NotInstalledError(ImportError):
    def _render_traceback_(self):  # which a notebook shows in place of the traceback
        return [str(self)]


def install(package):
    """Without dependencies, so that Colab's own jax, its compilers and torch stay."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", package]
    if subprocess.run(pip).returncode:
        raise NotInstalledError(f"pip could not install {package}; it says above why.")


# A folder of that name beside the notebook is found too, and has no origin.
installed = getattr(importlib.util.find_spec("jopt"), "origin", None)
wheels = glob.glob("jopt-*.whl")
if not wheels and not installed:
    wheels = glob.glob("/content/drive/MyDrive/**/jopt-*.whl", recursive=True)
if not wheels and not installed:
    raise NotInstalledError(
        "Put jopt's wheel, jopt-*.whl, beside this notebook (in Colab: the folder symbol on the left, Upload), and run "
        "this cell again. `pip wheel --no-deps -w dist .` in a copy of jopt's repository makes it."
    )
wheel = max(wheels, key=os.path.getmtime, default=None)
if wheel and not (installed and os.path.getmtime(installed) > os.path.getmtime(wheel)):
    # A browser names a second download "jopt-... (1).whl", which pip does not take.
    name = os.path.basename(wheel).partition("-none-any")[0] + "-none-any.whl"
    install(shutil.copy(wheel, os.path.join(tempfile.mkdtemp(), name)))
    if "jopt" in sys.modules:
        print("Another jopt is in use already: Runtime, Restart session, and run all cells again.")
if importlib.util.find_spec("optax") is None:
    install("optax")
