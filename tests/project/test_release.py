"""What a release is made by: version, changelog and tag agree, and a commit has one wheel and one source archive."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytest.importorskip("build", reason="pip install '.[test]' brings what builds the wheel")

import jopt
from tests import ROOT
from tools import release


@pytest.fixture
def checkout(tmp_path):
    """A repository with what the check reads, in one commit."""

    def make(version="1.2.3", changelog="## Unreleased\n\n## 1.2.3 (2026-12-01)\n\n- All.\n\n## 1.2.2 (2026-01-01)\n"):
        (tmp_path / "jopt").mkdir()
        (tmp_path / "jopt" / "__init__.py").write_text(f'"""Text."""\n__version__ = "{version}"\n')
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{changelog}")
        git(tmp_path, "init", "-q")
        git(tmp_path, "add", ".")
        git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
        return tmp_path

    return make


def git(root, *arguments):
    subprocess.run(["git", "-C", str(root), *arguments], check=True)


def test_the_changelog_has_this_version():
    assert release.version() == jopt.__version__
    assert release.problems([]) == []
    assert next(iter(release.sections())) == "Unreleased"


def test_the_citation_has_this_version():
    cited = re.search("^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert cited == jopt.__version__ or ".dev" in jopt.__version__


def locked():
    """The versions of requirements/dev.txt by name."""
    text = (ROOT / "requirements" / "dev.txt").read_text()
    blocks = re.findall(r"^([\w.-]+)==(\S+) \\\n((?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert len(blocks) == len(re.findall(r"^\w", text, re.MULTILINE)), "a line without a version or a hash"
    return {canonicalize_name(name): version for name, version, _ in blocks}


def wanted(project, name):
    """The requirements of an extra, those of the extras that it names included."""
    for text in project["optional-dependencies"][name]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            for extra in requirement.extras:
                yield from wanted(project, extra)
        else:
            yield requirement


@pytest.mark.parametrize("extra", ["dev", "release"])
def test_the_lock_is_what_the_package_asks_for(extra):
    """`make lock` writes it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = locked()
    for requirement in [*map(Requirement, project["dependencies"]), *wanted(project, extra)]:
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement
    torch = re.search(r"^TORCH +[?]= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert found["torch"] == f"{torch}+cpu"
    assert not [name for name in found if name.startswith("nvidia")]


def test_notes_of_a_version(checkout, capsys):
    root = checkout()
    git(root, "tag", "v1.2.3")
    assert release.main(["--notes"], root) == 0
    assert capsys.readouterr().out == "- All.\n"


@pytest.mark.parametrize(
    ("tag", "changelog", "says"),
    [
        (None, "## Unreleased\n\n- All.\n", "expected a section '## 1.2.3 (unreleased)', or with its date, found none"),
        ("v1.2.4", "## 1.2.3 (2026-12-01)\n", "tag v1.2.4: expected v1.2.3, as jopt/__init__.py has it"),
        ("v1.2.3rc1", "## 1.2.3 (2026-12-01)\n", "tag v1.2.3rc1: expected v1.2.3"),
        ("v1.2.3", "## 1.2.3 (unreleased)\n", "tag v1.2.3: expected the date in CHANGELOG.md"),
        ("v1.2.3", "## 1.2.2 (2026-12-01)\n", "expected a section '## 1.2.3 (unreleased)'"),
        ("v1.2.3", "## Unreleased\n\n- More.\n\n## 1.2.3 (2026-12-01)\n", "has lines under Unreleased"),
    ],
)
def test_what_does_not_agree_is_not_built(tag, changelog, says, checkout, capsys):
    root = checkout(changelog=changelog)
    if tag:
        git(root, "tag", tag)
    assert release.main([], root) == 1
    assert says in capsys.readouterr().err
    assert not (root / "dist").exists()


def test_a_tag_that_the_caller_names(checkout, capsys):
    root = checkout()
    assert release.main(["--notes", "--tag", "v1.2.3"], root) == 0
    assert release.main(["--notes", "--tag", "v1.2.4"], root) == 1
    assert "tag v1.2.4: expected v1.2.3" in capsys.readouterr().err


def test_a_tag_of_other_files_is_not_built(checkout, capsys):
    root = checkout()
    git(root, "tag", "v1.2.3")
    assert release.main(["--notes"], root) == 0
    (root / "extra.py").touch()
    assert release.main(["--notes"], root) == 1
    assert "the files are not those of the commit:\n?? extra.py" in capsys.readouterr().err


def test_between_releases(checkout, capsys):
    """A version to come, which no tag can be of: what changed since the last one is its section."""
    root = checkout("1.3.0.dev0", "## Unreleased\n\n- More.\n\n## 1.2.3 (2026-12-01)\n")
    assert release.main(["--notes"], root) == 0
    assert capsys.readouterr().out == "- More.\n"
    assert release.main(["--notes", "--tag", "v1.3.0"], root) == 1
    assert "tag v1.3.0: expected v1.3.0.dev0" in capsys.readouterr().err


def test_other_tags_do_not_matter(checkout):
    root = checkout(changelog="## 1.2.3 (unreleased)\n")
    git(root, "tag", "latest")
    assert release.main(["--notes"], root) == 0


@pytest.mark.slow  # builds four times
@pytest.mark.skipif(release.git("log", "-1") is None, reason="an unpacked archive has no commit to build")
def test_one_commit_one_wheel_and_one_archive(tmp_path):
    """From two folders with other dates and permissions, and from the archive itself; which holds what git has."""
    hashes = []
    for name, date, mask in (("a", 1_500_000_000, 0o022), ("elsewhere/b", 1_700_000_000, 0o077)):
        root = tmp_path / name
        before = os.umask(mask)
        try:
            subprocess.run(["git", "clone", "-q", str(ROOT), str(root)], check=True)
        finally:
            os.umask(before)
        for path in root.rglob("*"):
            os.utime(path, (date, date))
        built = release.build(root / "dist", root)
        hashes.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in built})
    wheel, archive = built
    assert (wheel.suffix, archive.name) == (".whl", f"jopt-{jopt.__version__}.tar.gz")
    assert hashes[0] == hashes[1]

    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        file.extractall(tmp_path, filter="data")
    tracked = subprocess.run(["git", "ls-files"], cwd=root, check=True, capture_output=True, text=True).stdout.split()
    assert names - {"PKG-INFO"} == set(tracked)

    unpacked = tmp_path / f"jopt-{jopt.__version__}"
    date = release.git("log", "-1", "--format=%ct")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path / "again"), "."]
    subprocess.run(
        command, cwd=unpacked, env=os.environ | {"SOURCE_DATE_EPOCH": date}, check=True, stdout=subprocess.DEVNULL
    )
    assert (tmp_path / "again" / wheel.name).read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_the_archives_tests_run_where_they_are_unpacked(tmp_path):
    """All of them are found, and those of the pages and of this file pass, without git."""
    (archive,) = (path for path in release.build(tmp_path / "dist") if path.suffix == ".gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"jopt-{jopt.__version__}"
    outside = os.environ | {"PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    found = subprocess.run([*command, "--collect-only"], cwd=unpacked, env=outside, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
    assert int(re.search(r"(\d+)/?\d* tests collected", found.stdout)[1]) > 4000
    files = ["tests/project/test_release.py", "tests/project/test_docs.py", "tests/project/test_rooms.py"]
    done = subprocess.run([*command, *files], cwd=unpacked, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    shutil.rmtree(unpacked)
