"""The pages of docs/optimizers: their examples run and learn, and their tables are the functions' signatures."""

import inspect
import re

import pytest

import jopt
from benchmarks import report
from jopt._compat import numbers
from tests import ROOT

PAGES = ROOT / "docs" / "optimizers"
OPTIMIZERS = sorted(p.stem for p in PAGES.glob("*.md") if p.stem != "README")
SHARED = {"state_dtype", "master_copy", "stochastic_rounding", "hyperparams_in_state"}


def examples():
    for page in sorted(PAGES.glob("*.md")):
        for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(code, id=f"{page.stem}-{i}")


def rows(page):
    return dict(re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|required) \|", (PAGES / f"{page}.md").read_text(), re.MULTILINE))


def test_every_optimizer_has_a_page():
    functions = {
        name
        for name in jopt.__all__
        if getattr(getattr(jopt, name), "__module__", "").startswith(("jopt.optimizers.", "jopt.lbfgs"))
    }
    assert functions - {"schedule_free_eval"} == set(OPTIMIZERS)
    index = (PAGES / "README.md").read_text()
    assert all(f"]({name}.md) | `jopt.{name}`" in index for name in OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arguments_are_the_functions(name):
    parameters = inspect.signature(getattr(jopt, name)).parameters.values()
    shared = {} if name == "lbfgs" else rows("README")
    expected = {p.name: "" if p.default is p.empty else repr(p.default) for p in parameters}
    assert rows(name) | shared == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_takes_the_same(name):
    torch = pytest.importorskip("torch", reason="torch's signatures")
    found = re.search(r"`interop\.optim\.(\w+)` take", (PAGES / f"{name}.md").read_text())
    if found is None:
        assert name not in {x.lower() for x in dir(torch.optim)}
        return
    theirs = inspect.signature(getattr(torch.optim, found[1])).parameters
    ours = {("adam", "cautious"), ("adamw", "cautious")}
    new = {("lbfgs", "maximize")} if numbers(torch.__version__) < (2, 14) else set()
    for argument, default in rows(name).items():
        if (name, argument) not in new | ours:
            assert repr(theirs[argument].default) == default


@pytest.mark.parametrize("code", list(examples()))
def test_examples_run_and_learn(code):
    import jax

    if "torch" in code:
        pytest.importorskip("torch", reason="a torch example")
    names = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(code, names)
    if "losses" in names:
        assert names["losses"][-1] < 0.1 * names["losses"][0]
    else:
        assert "params" in names


@pytest.mark.slow  # two dozen sweeps are compiled
def test_the_page_on_choosing_is_written(tmp_path):
    pytest.importorskip("sklearn", reason="of the demo extra")
    import jax

    from benchmarks import choosing

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        choosing.main(["--steps", "20", "--out", str(tmp_path)])
    page = (tmp_path / "choosing.md").read_text()
    committed = (PAGES.parent / "choosing.md").read_text()
    row = r"^\| ((?:9\.\d )?[A-Z][^|]*\.) \|.*\*\*(?:holds|does not)"
    pieces = [re.findall(row, text, re.MULTILINE) for text in (page, committed)]
    assert pieces[0] == pieces[1]
    assert len(pieces[0]) == 13 + 13  # the usual advice, and the article's
    assert (tmp_path / "choosing.png").stat().st_size > 10_000


WRITTEN = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/results/*.md")]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_keep_to_one_width(page):
    assert report.wrapped(page.read_text()) == page.read_text(), "benchmarks.report.wrapped does it"
