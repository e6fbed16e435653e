"""The pages of docs/optimizers: their examples run and learn, and their tables are the functions' signatures."""

import inspect
import re
import subprocess
import sys

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
    assert functions == set(OPTIMIZERS)
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


def side_by_side():
    """The rows of the index's second table: a call, and state, least passes and compiled passes as they stand there."""
    table = (PAGES / "README.md").read_text().split("## Side by side")[1].split("\n## ")[0]
    for row in re.findall(r"^\| \[.*$", table, re.MULTILINE):
        _, _, *figures, _, call = (cell.strip() for cell in row[1:-1].split("|"))
        yield call.strip("`"), figures


def matrix():
    import jax

    return {"w": jax.ShapeDtypeStruct((1024, 1024), jax.numpy.float32)}


def test_side_by_side_has_every_optimizer():
    assert {re.match(r"jopt\.(\w+)", call)[1] for call, _ in side_by_side()} == set(OPTIMIZERS)


@pytest.mark.parametrize(("call", "figures"), [pytest.param(*row, id=row[0]) for row in side_by_side()])
def test_state_side_by_side_is_counted(call, figures):
    import jax

    state = jax.eval_shape(eval(call, {"jopt": jopt}).init, matrix())
    tensors = sum(x.size for x in jax.tree.leaves(state)) / 1024**2
    assert float(figures[0]) == round(tensors, 3)
    if figures[1]:
        assert int(figures[1]) == round(3 + 2 * tensors)


PASSES = """
import sys, jax, jopt
jopt.enable_multi_output_fusion()
params = {"w": jax.ShapeDtypeStruct((1024, 1024), jax.numpy.float32)}
for call in sys.argv[1:]:
    found = jopt.explain(eval(call), params)
    print(round(found.minimum_passes), "" if found.passes is None else round(found.passes))
"""


@pytest.mark.slow  # thirty programs are compiled, in a process of its own for XLA's flag
def test_passes_side_by_side_are_the_programs():
    import jax

    if numbers(jax.__version__)[:2] != (0, 10):
        pytest.skip("the table is of jax 0.10's compiler")
    rows = [row for row in side_by_side() if row[1][1]]
    command = [sys.executable, "-c", PASSES, *(call for call, _ in rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split("\n")[:-1] == [f"{least} {compiled}" for _, (_, least, compiled) in rows]


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
