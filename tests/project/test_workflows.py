"""The workflows run what the repository has, with the least that they need; `make lint-workflows` has the rest."""

import re

import pytest

yaml = pytest.importorskip("yaml", reason="pre-commit, of the dev extra, brings it")

from tests import ROOT  # noqa: E402

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
files = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def jobs(file):
    return yaml.safe_load(file.read_text())["jobs"]


def steps(file):
    return [step for job in jobs(file).values() for step in job.get("steps", ())]


def test_all_are_found():
    assert [file.stem for file in FILES] == ["docs", "nightly", "release", "tests"]


@files
def test_actions_are_pinned_by_commit_with_their_version(file):
    used = re.findall(r"uses: (.*)", file.read_text())
    assert used
    for action in used:
        assert action.startswith("./") or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)


def test_an_action_has_one_version():
    used = {x for file in FILES for x in re.findall(r"uses: (\w.*)", file.read_text())}
    assert len(used) == len({x.partition("@")[0] for x in used})


@files
def test_a_job_may_do_no_more_than_it_needs(file):
    assert yaml.safe_load(file.read_text())["permissions"] == {"contents": "read"}
    may = {name: job["permissions"] for name, job in jobs(file).items() if "permissions" in job}
    assert may == ({"publish": {"id-token": "write"}} if file.stem == "release" else {})
    for step in steps(file):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert "${{" not in step.get("run", ""), "what a stranger names goes through the environment"


@files
def test_a_job_ends(file):
    assert all("timeout-minutes" in job for job in jobs(file).values() if "uses" not in job)


def test_what_is_published_was_tested_on_a_tag():
    found = jobs(ROOT / ".github" / "workflows" / "release.yml")
    assert found["publish"]["needs"] == ["build", "install", "tests"]
    assert found["publish"]["if"] == found["tests"]["if"] == "github.ref_type == 'tag'"
    assert found["publish"]["environment"] == "pypi"


@files
def test_commands_are_there(file):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = " ".join(step.get("run", "") for step in steps(file))
    assert set(re.findall(r"\bmake ([\w-]+)", commands)) <= targets
    if "versions.sh" in commands:
        known = set(re.findall(r"^ +([\w-]+)\) run", (ROOT / "tests" / "versions.sh").read_text(), re.MULTILINE))
        matrix = jobs(file)["versions"]["strategy"]["matrix"]
        assert {*matrix.get("set", ()), *(row["set"] for row in matrix.get("include", ()))} <= known
