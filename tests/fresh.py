"""The package's wheel, and environments that hold some of the installed packages and nothing else."""

import importlib.metadata as metadata
import re
import subprocess
import sys
from pathlib import Path

from tests import ROOT


def wheel(folder: Path) -> Path:
    """Built from this checkout."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("jopt-*.whl")
    return built


def needed(*names: str) -> set[str]:
    """The installed packages that these need, by what they declare; those of extras are not needed."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = _canonical(waiting.pop())
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform or Python
            continue
        found.add(name)
        for requirement in requirements:
            if "extra ==" not in requirement:
                waiting.append(re.match(r"[\w.-]+", requirement)[0])
    return found


def environment(folder: Path, *names: str) -> Path:
    """The Python of an environment of these packages, what they need, and pip. They are links: it takes a second."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    packages = folder / "packages"
    packages.mkdir()
    for name in needed(*names):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = packages / top
            if not target.exists():
                target.symlink_to(distribution.locate_file(top))
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return folder / "bin" / "python"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
