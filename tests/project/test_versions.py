"""Versions: what is too old says so, what is newer is allowed, and what a newer torch adds is never ignored."""

import re
import subprocess
import sys
import textwrap
import tomllib

import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from jopt._compat import NEEDED, numbers
from tests import ROOT


def run(code, **environment):
    """The last line of a fresh process's errors, "" for none; warnings are errors."""
    import os

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    # Where the plugin for CUDA is installed and no GPU is there, it says so.
    log = re.compile(r"WARNING: All log messages before absl|[IW]\d{4} .*cudart_stub")
    lines = [line for line in done.stderr.strip().splitlines() if not log.match(line)]
    assert (done.returncode == 0) == (not lines), done.stderr
    return (lines or [""])[-1]


def pretending(found, then):
    """Code that imports `then` where the installed versions are those of `found`."""
    return f"""
        import importlib.metadata as metadata
        real, found = metadata.version, {found!r}
        def version(name):
            if found.get(name, "") is None:
                raise metadata.PackageNotFoundError(name)
            return found.get(name) or real(name)
        metadata.version = version
        import {then}
    """


def test_the_bounds_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [f"{name}>={least}" for name, least in NEEDED.items()]
    assert project["requires-python"] == ">=3.11"


def test_numbers_of_a_version():
    assert numbers("2.9.0+cpu") == (2, 9, 0)
    assert numbers("0.12.1.dev20261101") == (0, 12, 1)
    assert numbers("2.14.0a0+git1234") == (2, 14, 0)
    assert numbers("0.10.2") > numbers("0.9.12")


@pytest.mark.parametrize(
    ("name", "found"), [("jax", "0.7.1"), ("jaxlib", None), ("optax", "0.2.4"), ("numpy", "1.26.4"), ("jax", None)]
)
def test_too_old_or_missing_is_said_in_one_line(name, found):
    least = NEEDED[name]
    assert run(pretending({name: found}, "jopt")) == (
        f"ImportError: jopt needs {name}>={least}, found {found or 'none'}: pip install -U '{name}>={least}'"
    )


def test_a_version_that_is_not_yet_released_is_allowed():
    assert run(pretending({"jax": "1.0.0", "jaxlib": "1.0.0", "numpy": "3.0.0", "optax": "1.0"}, "jopt")) == ""


def test_a_jaxlib_of_another_jax_is_said(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise RuntimeError('jaxlib is version 1, jax requires 2')")
    line = run("import jopt", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert re.fullmatch(
        r"ImportError: jopt needs a jaxlib that goes with its jax [\d.]+, found [\d.]+: pip install -U jax jaxlib "
        r"\(jaxlib is version 1, jax requires 2\)",
        line,
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_platform_that_is_not_there(platform):
    """JAX alone raises an AssertionError without a word for cuda."""
    code = "import numpy as np, jopt; jopt.adam().init({'w': np.ones(3, np.float32)})"
    line = run(code, JAX_PLATFORMS=platform)
    assert line.startswith(
        f"RuntimeError: JAX finds no device here. JAX_PLATFORMS is '{platform}': unset it, or set it to 'cpu'; or "
        "install what its platform needs, as pip install 'jax[cuda12]' on a machine with a GPU. JAX said: "
    )


def test_nothing_else_asks_for_a_version():
    found = {
        str(path.relative_to(ROOT))
        for folder in ("jopt", "interop")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"__version_info__|\bTORCH\b|\bJAX <|__version__\s*[<>]|importlib.metadata", path.read_text())
    }
    report = "interop/environment/__init__.py"  # it tells what is installed, and decides nothing by it
    assert found == {"jopt/_compat.py", "interop/_compat.py", report}


@pytest.mark.parametrize("shape", [(3, 5), (6, 2), (4, 4)])
def test_muons_unclamped_adjustment(shape):
    """sqrt(rows / columns) in place of sqrt(max(1, rows / columns)): Bernstein's."""
    p = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)}
    moved = {}
    for name in ("original", "spectral_unclamped"):
        tx = jopt.muon(lr=0.1, weight_decay=0, adjust_lr_fn=name)
        moved[name] = tx.step(p, tx.init(p), {"w": jnp.zeros(shape)})[0]["w"]
    rows, columns = shape
    ratio = np.float32((rows / columns) ** 0.5 / max(1, rows / columns) ** 0.5)
    np.testing.assert_allclose(moved["spectral_unclamped"], moved["original"] * ratio, rtol=1e-6)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_maximizes(search):
    """It steps f as it steps -f, of which signs alone differ."""
    import jax

    def f(x):
        return jnp.sum((x - 1) ** 2 * jnp.array([1.0, 5.0])) + jnp.sum(jnp.cos(x))

    found = []
    for sign in (1, -1):
        value_and_grad = jax.value_and_grad(lambda x, sign=sign: sign * f(x))
        solver = jopt.lbfgs(lr=0.5, max_iter=5, line_search_fn=search, maximize=sign < 0)
        x = jnp.array([3.0, -2.0])
        state = solver.init(x)
        for _ in range(3):
            x, state, loss = solver.step(value_and_grad, state, x)
        found.append((x.tolist(), float(loss) * sign))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="maximize: expected True or False, found 'yes'"):
        jopt.lbfgs(maximize="yes")  # type: ignore[arg-type]


# --- torch ---------------------------------------------------------------------------------------------

torch = pytest.importorskip("torch", reason="what follows is about torch's versions")

import interop  # noqa: E402
from interop import _compat as interop_compat  # noqa: E402
from interop import optim  # noqa: E402
from interop._compat import TORCH  # noqa: E402
from interop.dropin import options  # noqa: E402


def test_an_old_torch_is_said():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["torch"] == ["torch>=2.9"]
    assert run(pretending({"torch": "2.8.1"}, "interop")) == (
        "ImportError: interop needs torch>=2.9, found 2.8.1: pip install -U 'torch>=2.9'"
    )
    assert run(pretending({"torch": "3.0.0"}, "interop")) == ""


@pytest.mark.parametrize(
    ("name", "found"), [("jax", "0.7.1"), ("jaxlib", None), ("optax", "0.2.4"), ("numpy", "1.26.4")]
)
def test_what_jopt_needs_interop_says_too(name, found):
    """Without importing it: jopt would import JAX."""
    assert interop_compat.NEEDED == NEEDED | {"torch": "2.9"}
    least = NEEDED[name]
    assert run(pretending({name: found}, "interop")) == (
        f"ImportError: interop needs {name}>={least}, found {found or 'none'}: pip install -U '{name}>={least}'"
    )


@pytest.mark.parametrize("version", ["2.9.0+cpu", "0.12.1.dev20261101", "2.14.0a0+git1234"])
def test_both_read_a_version_alike(version):
    assert interop_compat.numbers(version) == numbers(version)


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["cuda", "tpu", "cuda,cpu"])
@pytest.mark.parametrize("arguments", ["", ", max_norm=1.0"])
def test_a_step_asks_for_none_of_jaxs_devices(platforms, arguments):
    code = f"""
        import torch
        from interop import optim
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optim.Adam([p]{arguments}).step()
        assert p.sum() < 3
    """
    assert run(code, JAX_PLATFORMS=platforms) == ""


def test_every_option_of_every_class_is_known():
    """Of the torch at hand: else its default is all that can be used."""
    for name in optim.CLASSES:
        cls = getattr(optim, name)
        assert options._added(cls) == {}, name
    assert {
        name
        for name, x in vars(torch.optim).items()
        if isinstance(x, type) and issubclass(x, torch.optim.Optimizer) and x is not torch.optim.Optimizer
    } == set(optim.CLASSES)


@pytest.fixture
def newer_torch(monkeypatch):
    """A torch whose optimizers have an option that nobody here knows, and that changes what they compute."""

    def renew(cls, name, default):
        original = cls.__init__

        def init(self, params, lr=1e-3, *args, cautious=default, **kwargs):
            original(self, params, lr, *args, **kwargs)
            self.defaults["cautious"] = cautious
            for group in self.param_groups:
                group["cautious"] = cautious

        monkeypatch.setattr(cls, "__init__", init)

    for name in ("SGD", "LBFGS", "SparseAdam"):
        renew(getattr(torch.optim, name), name, None)
    options._added.cache_clear()
    yield
    options._added.cache_clear()


@pytest.mark.parametrize("name", ["SGD", "LBFGS", "SparseAdam"])
def test_an_unknown_option_is_refused_by_name(newer_torch, name):
    known, unknown = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    message = r"param_groups\[0\]\['cautious'\]: found True, an option of torch .* leave it at its default None"

    def step(opt, p):
        def closure():
            p.grad = None if name == "SparseAdam" else 2 * p.detach()
            return p.square().sum()

        return opt.step(closure)

    opt = getattr(optim, name)([known])  # at its default it computes what it always did
    step(opt, known)
    before = known.detach().clone()
    opt.param_groups[0]["cautious"] = True
    with pytest.raises(NotImplementedError, match=message):
        step(opt, known)
    assert torch.equal(known, before)
    opt = getattr(optim, name)([unknown], cautious=True)
    with pytest.raises(NotImplementedError, match=message):
        step(opt, unknown)
    model = torch.nn.Linear(2, 1, bias=False)
    native = getattr(torch.optim, name)(model.parameters(), cautious=True)
    if name != "SparseAdam":
        with pytest.raises(NotImplementedError, match=message):
            interop.optimizer_to_jax(native, model)


def test_an_unknown_entry_of_all_groups_is_refused_by_name(monkeypatch):
    """Such as `decoupled_weight_decay` once was: torch's class sets it, and it changes what is computed."""
    original = torch.optim.Optimizer.__init__
    monkeypatch.setattr(
        torch.optim.Optimizer, "__init__", lambda self, params, defaults: original(self, params, defaults | {"form": 2})
    )
    with pytest.raises(NotImplementedError, match=r"defaults\['form'\]: torch .* puts it into each group of Adam"):
        optim.Adam([torch.nn.Parameter(torch.ones(2))])


def test_an_unknown_value_of_a_flag_is_refused_by_name():
    p = torch.nn.Parameter(torch.ones(2))
    opt = optim.Adam([p], amsgrad="smooth")  # type: ignore[arg-type]  # torch's constructor takes anything
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match="amsgrad: expected True or False, found 'smooth'"):
        opt.step()
    assert p.tolist() == [1, 1]
    with pytest.raises(ValueError, match="maximize: expected True or False, found 'always'"):
        jopt.adam(maximize="always")  # type: ignore[arg-type]
    w = torch.nn.Parameter(torch.ones(2, 2))
    muon = optim.Muon([w])
    muon.param_groups[0]["adjust_lr_fn"] = "by_depth"
    w.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="by_depth is not supported"):
        muon.step()


def test_an_unknown_class_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.optim, "Novel", type("Novel", (torch.optim.Optimizer,), {}), raising=False)
    with pytest.raises(AttributeError, match=r"interop.optim has no Novel, which torch .* has and this version of"):
        _ = optim.Novel
    with pytest.raises(AttributeError, match=r"module 'interop.optim' has no attribute 'Nothing'"):
        _ = optim.Nothing


def test_an_unknown_argument_of_a_moved_run_is_refused():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match="weight_decai"):
        interop.optimizer_to_jax(torch.optim.Adam(model.parameters()), model, weight_decai=0.1)


@pytest.mark.skipif(TORCH < (2, 14), reason="torch 2.14 brought them")
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_maximizes_as_torch(search):
    results = []
    for module in (torch.optim, optim):
        p = torch.nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
        opt = module.LBFGS([p], lr=0.5, max_iter=5, line_search_fn=search, maximize=True)

        def closure(p=p, opt=opt):
            opt.zero_grad()
            loss = -((p - 1) ** 2 * torch.tensor([1.0, 5.0])).sum() - p.cos().sum()
            loss.backward()
            return loss

        results.append([opt.step(closure).item() for _ in range(3)] + p.tolist())
    assert results[0] == results[1]


@pytest.mark.skipif(TORCH < (2, 14), reason="torch 2.14 brought them")
def test_muons_unclamped_adjustment_is_torchs():
    results = []
    for module in (torch.optim, optim):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(3, 7))
        opt = module.Muon([p], lr=0.1, adjust_lr_fn="spectral_unclamped")
        for _ in range(3):
            p.grad = torch.sin(p.detach())
            opt.step()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
