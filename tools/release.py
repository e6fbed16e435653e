"""Build the wheel and the source archive of this commit into dist/, if version, changelog and tag agree: `make dist`.

The bytes depend on the commit alone, not on the folder or the time, so whoever builds a tag can compare hashes. The
archive is what git has, and the wheel's dates are the commit's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def version(root: Path = ROOT) -> str:
    """Of the package, as hatchling reads it."""
    return re.findall(r'^__version__ = "(.+)"$', (root / "jopt" / "__init__.py").read_text(), re.MULTILINE)[0]


def sections(root: Path = ROOT) -> dict[str, str]:
    """CHANGELOG's texts by heading."""
    parts = re.split(r"^## (.+)\n", (root / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    return {heading: text.strip() for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def section(root: Path = ROOT) -> str | None:
    """The heading of this version's section: with a date once it is released; a version to come has Unreleased."""
    here = version(root)
    wanted = r"Unreleased" if ".dev" in here else rf"{re.escape(here)} \((unreleased|\d{{4}}-\d\d-\d\d)\)"
    return next((heading for heading in sections(root) if re.fullmatch(wanted, heading)), None)


def problems(tags: Sequence[str], root: Path = ROOT) -> list[str]:
    """Why this commit is no release under these tags; without a tag, what is wrong anyway."""
    here, heading = version(root), section(root)
    if heading is None:
        return [f"CHANGELOG.md: expected a section '## {here} (unreleased)', or with its date, found none"]
    found = []
    for tag in tags:
        if tag != f"v{here}":
            found.append(f"tag {tag}: expected v{here}, as jopt/__init__.py has it; move the tag or the version")
        elif heading.endswith("(unreleased)"):
            found.append(f"tag {tag}: expected the date in CHANGELOG.md, as '## {here} (2026-12-31)'")
        elif sections(root).get("Unreleased"):
            found.append(f"tag {tag}: CHANGELOG.md has lines under Unreleased; move them to {here}")
    return found


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """What git answers; None where this is no checkout, as in an unpacked source archive."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    top_level = root / ".git"  # a folder above may be another's checkout
    return done.stdout.strip() if done.returncode == 0 and top_level.exists() else None


def build(out: Path, root: Path = ROOT) -> list[Path]:
    """The two files, in a new folder."""
    if out.exists():
        shutil.rmtree(out)
    commit = git("log", "-1", "--format=%ct", root=root)
    environment = os.environ | ({"SOURCE_DATE_EPOCH": commit} if commit else {})
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(root)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return sorted(out.iterdir())


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--notes", action="store_true", help="print the version's section of CHANGELOG.md, and no more")
    parser.add_argument("--tag", help="a tag that this commit has to be released under; else those that it has")
    options = parser.parse_args(arguments)
    tags = [tag for tag in (git("tag", "--points-at", "HEAD", root=root) or "").split() if tag.startswith("v")]
    tags += [options.tag] if options.tag and options.tag not in tags else []
    found = problems(tags, root)
    changed = git("status", "--porcelain", root=root)
    if tags and changed:
        found.append(f"tag {tags[0]}: the files are not those of the commit:\n{changed}")
    if found:
        print("\n".join(found), file=sys.stderr)
        return 1
    if options.notes:
        print(sections(root)[section(root) or ""])
        return 0
    for path in build(root / "dist", root):
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
