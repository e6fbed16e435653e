"""What the drop-in's step does besides: clipping by the norm, averages, unscaling; as torch composes them."""

import copy
import inspect
import pickle
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the drop-in is for torch")

from interop import amp, optim  # noqa: E402
from interop.dropin import arranging  # noqa: E402
from interop.memory import HOST  # noqa: E402
from jopt._compat import JAX  # noqa: E402
from tests import cases  # noqa: E402
from tests.interop.dropin.test_optimizer import assert_equal, backward, network  # noqa: E402

DECAY = 0.9
NORM = {torch.float32: 1e-6, torch.float64: 1e-14}  # some ulps of a sum; torch's own is 4e-5 off at 2 M elements
NAMES = [case.torch for case in cases.CASES if case.torch and case.id == case.name]


def averaged(model):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


def theirs(model, opt, average, max_norm):
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm) if max_norm is not None else None
    opt.step()
    if average is not None:
        average.update_parameters(model)
    return norm


def assert_averages(average, model, opt):
    for p, q in zip(average.module.parameters(), model.parameters(), strict=True):
        tolerance = cases.NETWORK[str(q.dtype).removeprefix("torch.")]
        assert cases.difference(opt.state[q]["ema"].double(), p.detach().double()) <= tolerance


@pytest.mark.parametrize("dtype", cases.mostly_slow([torch.float32, torch.float64], [torch.float64]))
@pytest.mark.parametrize("name", NAMES)
def test_clipping_and_averages_are_torchs(name, dtype):
    models = [network(dtype, bias=name != "Muon") for _ in range(2)]
    # A norm between those that occur, so that some steps are clipped and some are not.
    max_norm = 0.05 if name != "Muon" else 0.1
    reference = getattr(torch.optim, name)(models[0].parameters(), lr=0.01)
    ours = getattr(optim, name)(models[1].parameters(), lr=0.01, max_norm=max_norm, ema=DECAY)
    average, clipped = averaged(models[0]), []
    for i in range(6):
        for model, opt in zip(models, (reference, ours), strict=True):
            opt.zero_grad()
            (backward(model, i) if i % 2 else (backward(model, i) * 0.01))
            if i % 2 == 0:
                for p in model.parameters():
                    p.grad *= 0.01
        before = [p.grad.clone() for p in models[1].parameters()]
        norm = theirs(models[0], reference, average, max_norm)
        ours.step()
        assert ours.grad_norm.dtype is dtype
        truth = torch.cat([g.double().flatten() for g in before]).norm()
        np.testing.assert_allclose(ours.grad_norm.item(), truth.item(), rtol=NORM[dtype])
        clipped.append(bool(norm > max_norm))
        assert all(torch.equal(p.grad, g) for p, g in zip(models[1].parameters(), before, strict=True))
        assert not ours.skipped
    assert set(clipped) == {True, False}
    if (name, dtype) != ("Muon", torch.float32):  # whose iteration magnifies an ulp of the norm: tests/cases.py
        assert_equal(*models)
        assert_averages(average, models[1], ours)


def test_bfloat16_is_clipped_in_bfloat16():
    """To the bit: the norms, the factor and the products are rounded as torch rounds them."""
    params = [[torch.nn.Parameter(torch.linspace(-1, 1, n).bfloat16()) for n in (64, 128)] for _ in range(2)]
    reference = torch.optim.SGD(params[0], lr=0.5)
    ours = optim.SGD(params[1], lr=0.5, max_norm=0.3, ema=0.5)
    for i in range(4):
        for ps in params:
            for p in ps:
                generator = torch.Generator().manual_seed(i)
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        norm = torch.nn.utils.clip_grad_norm_(params[0], 0.3)
        reference.step()
        ours.step()
        assert ours.grad_norm.dtype is torch.bfloat16
        assert ours.grad_norm == norm
        assert all(torch.equal(p, q) for p, q in zip(*params, strict=True))


@pytest.mark.parametrize("shelf", [arranging.SHELF, 256])
def test_one_norm_over_types_groups_and_shelves(monkeypatch, shelf):
    """Small leaves on several shelves share the memory that their gradients are gathered in."""
    monkeypatch.setattr(arranging, "SHELF", shelf)
    shapes = [(70,), (130,), (40000,), (200,), (3, 5), (100,)]
    dtypes = [torch.float32, torch.float32, torch.float32, torch.float64, torch.float64, torch.float32]
    results = []
    for module, options in ((torch.optim, {}), (optim, dict(max_norm=0.7))):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(s, generator=generator).to(d)) for s, d in zip(shapes, dtypes, strict=True)
        ]
        groups = [dict(params=params[::2]), dict(params=params[1::2], lr=0.1)]
        opt = module.AdamW(groups, lr=0.01, **options)
        norms = []
        for i in range(8):
            for j, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.01 if (i + j) % 3 or not i else None
            if module is torch.optim:
                norms.append(torch.nn.utils.clip_grad_norm_(params, 0.7).item())
            opt.step()
            if module is optim:
                norms.append(opt.grad_norm.item())
        results.append((norms, params))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-5)
    assert min(results[0][0]) < 0.7 < max(results[0][0])
    for p, q in zip(results[0][1], results[1][1], strict=True):
        assert cases.difference(q.detach().double(), p.detach().double()) <= cases.NETWORK["float32"]
    if shelf == 256:
        assert len(opt._plan.buckets) > 2
        assert max(bucket.layout.size for bucket in opt._plan.buckets) <= shelf


def test_shelves_without_clipping(monkeypatch):
    monkeypatch.setattr(arranging, "SHELF", 256)
    models = [torch.nn.Sequential(*[torch.nn.Linear(9, 9) for _ in range(8)]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, module in zip(models, (torch.optim, optim), strict=True):
        opt = module.Adam(model.parameters(), lr=0.01)
        for i in range(3):
            opt.zero_grad()
            model(torch.randn(4, 9, generator=torch.Generator().manual_seed(i))).pow(2).sum().backward()
            model[i].bias.grad = None
            opt.step()
    assert len(opt._plan.buckets) > 2
    assert_equal(*models)


# --- averages


def test_averages_go_on_for_absent_gradients_and_begin_late():
    """As AveragedModel's do, which looks at no gradient."""
    models = [network() for _ in range(2)]
    reference = torch.optim.SGD(models[0].parameters(), lr=0.1)
    ours = optim.SGD(models[1].parameters(), lr=0.1, ema=DECAY)
    average = averaged(models[0])
    for i in range(6):
        for model, opt in zip(models, (reference, ours), strict=True):
            opt.zero_grad()
            backward(model, i)
            if i in (0, 3, 4):
                model[2].bias.grad = None  # at the first step too
        theirs(models[0], reference, average, None)
        ours.step()
    assert_equal(*models)
    assert_averages(average, models[1], ours)


def test_averages_are_state():
    """Saved, loaded, copied, switched on and off; a checkpoint of torch's has none and begins them."""
    model = network()
    opt = optim.AdamW(model.parameters(), lr=0.01, ema=DECAY, max_norm=1.0)
    backward(model)
    opt.step()
    first = [opt.state[p]["ema"].clone() for p in model.parameters()]
    for p, e in zip(model.parameters(), first, strict=True):
        assert torch.equal(p, e)  # the first is the parameter itself
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    other = copy.deepcopy(model)
    twin = optim.AdamW(other.parameters(), lr=0.01, ema=DECAY, max_norm=1.0)
    twin.load_state_dict(saved)
    torch.optim.AdamW(copy.deepcopy(model).parameters()).load_state_dict(saved)
    pickled_model, pickled = pickle.loads(pickle.dumps((model, opt)))
    assert (pickled.max_norm, pickled.ema) == (1.0, DECAY)
    for m, o in ((model, opt), (other, twin), (pickled_model, pickled)):
        o.zero_grad()
        backward(m, 1)
        o.step()
    for ps in zip(model.parameters(), other.parameters(), pickled_model.parameters(), strict=True):
        a, *rest = (o.state[p]["ema"] for p, o in zip(ps, (opt, twin, pickled), strict=True))
        assert all(torch.equal(a, b) for b in rest)

    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(
        {**saved, "state": {i: {k: v for k, v in s.items() if k != "ema"} for i, s in saved["state"].items()}}
    )
    opt.load_state_dict(plain.state_dict())
    opt.step()
    assert all(torch.equal(opt.state[p]["ema"], p) for p in model.parameters())
    opt.ema = None
    held = {p: opt.state[p]["ema"].clone() for p in model.parameters()}
    opt.step()
    assert all(torch.equal(opt.state[p]["ema"], e) for p, e in held.items())
    opt.ema = DECAY
    opt.step()
    for p, e in held.items():
        torch.testing.assert_close(opt.state[p]["ema"], e.lerp(p.detach(), 1 - DECAY))


# --- mixed precision


def test_grad_scaler_is_torchs_with_skips():
    """A skipped step changes neither parameters nor state nor step counts; averages go on, as in torch's loop."""
    runs = []
    for scaler_class, module, options in (
        (torch.amp.GradScaler, torch.optim, {}),
        (amp.GradScaler, optim, dict(max_norm=0.05, ema=DECAY)),
    ):
        model = network()
        opt = module.AdamW(model.parameters(), lr=0.01, **options)
        scaler = scaler_class("cpu", init_scale=1024.0, growth_interval=2)
        average = averaged(model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        scales, skips = [], []
        for i in range(8):
            opt.zero_grad()
            x = torch.randn(8, 300, generator=torch.Generator().manual_seed(i))
            scaler.scale((model(x) ** 2).mean()).backward()
            if i in (1, 5):
                next(model.parameters()).grad[0, 0] = float("inf" if i == 1 else "nan")
            if i == 6:
                model[2].bias.grad[1] = float("nan")  # a small one
            if module is torch.optim:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                steps = opt.state[model[2].bias].get("step", torch.zeros(())).item()
                scaler.step(opt)
                skips.append(opt.state[model[2].bias].get("step", torch.zeros(())).item() == steps)
                average.update_parameters(model)
            else:
                scaler.step(opt)
                skips.append(opt.skipped)
            scaler.update()
            scheduler.step()
            scales.append(scaler.get_scale())
        runs.append((model, opt, scales, skips, average))
    (model, reference, scales, skips, average), (other, ours, *found, _) = runs
    assert [scales, skips] == found
    assert sum(skips) == 3
    assert_equal(model, other)
    assert_averages(average, other, ours)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert reference.state[p]["step"] == ours.state[q]["step"] == 5


def test_a_wrapper_that_takes_on_the_class_sees_the_optimizers_own():
    """As Lightning and Fabric wrap optimizers: an object of a subclass that forwards what it does not have."""

    class Wrapper:
        def __init__(self, inner):
            self.inner = inner
            self.__class__ = type("Wrapped", (Wrapper, type(inner)), {})

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def step(self):
            self.inner.step()

    models = [network() for _ in range(2)]
    direct = optim.AdamW(models[0].parameters(), lr=0.01, max_norm=0.05, ema=DECAY)
    inner = optim.AdamW(models[1].parameters(), lr=0.01, max_norm=7.0)
    wrapper = Wrapper(inner)
    assert (wrapper.max_norm, wrapper.ema, wrapper.skipped) == (7.0, None, False)
    wrapper.max_norm, wrapper.ema = 0.05, DECAY
    assert (inner.max_norm, inner.ema) == (0.05, DECAY)
    scaler = amp.GradScaler("cpu", init_scale=1024.0)
    for model, opt in zip(models, (direct, wrapper), strict=True):
        scaler.scale(model(torch.ones(8, 300)).pow(2).mean()).backward()
        scaler.step(opt)
        assert not opt.skipped
    assert wrapper.grad_norm == inner.grad_norm == direct.grad_norm > 0
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    models[1][2].bias.grad[0] = float("inf")
    scaler.update()
    scaler.step(wrapper)
    assert wrapper.skipped


def test_large_finite_gradients_are_no_infinities():
    """Their squares overflow; torch looks at the gradients themselves."""
    p = torch.nn.Parameter(torch.ones(HOST.big))
    small = torch.nn.Parameter(torch.ones(3))
    opt, scaler = optim.SGD([p, small], lr=1e-30), amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    for bad in (None, p, small):
        p.grad, small.grad = torch.full_like(p, 3e25), torch.full_like(small, 3e25)
        if bad is not None:
            bad.grad[-1] = float("inf")
        before = p.detach().clone()
        scaler.step(opt)
        assert opt.skipped == (bad is not None)
        assert torch.equal(before, p) == (bad is not None)
        scaler.update()


def test_grad_scaler_is_torchs_elsewhere():
    model = network()
    opt, scaler = optim.SGD(model.parameters(), lr=0.1), amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(1, 300)).sum()).backward()
    grad = model[2].bias.grad.clone()
    scaler.unscale_(opt)  # explicit: nothing is left to unscale
    assert torch.equal(model[2].bias.grad, grad / 4)
    scaler.step(opt)
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        scaler.step(opt)
    scaler.update()
    scaler.step(opt)
    with pytest.raises(RuntimeError, match="already been called since the last update"):
        scaler.step(opt)
    scaler.update()
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(opt, closure=lambda: None)
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    other.grad = torch.ones_like(other)
    with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients\."):
        scaler.step(optim.SGD([other], lr=0.1))
    for disabled in (amp.GradScaler("cpu", enabled=False),):
        disabled.step(opt)
        disabled.update()
    native = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.step(native)
    scaler.update()
    nothing = optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(AssertionError, match=r"No inf checks were recorded for this optimizer\."):
        scaler.step(nothing)
    assert scaler.state_dict().keys() == torch.amp.GradScaler("cpu").state_dict().keys()


# --- arguments


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(max_norm=-1.0), r"max_norm: expected a number of at least 0, or None, found -1\.0"),
        (dict(max_norm=float("nan")), "max_norm: .* found nan"),
        (dict(max_norm="1"), "max_norm: .* found '1'"),
        (dict(ema=1.5), r"ema: expected a decay between 0 and 1, or None, found 1\.5"),
        (dict(ema=True), "ema: .* found True"),
    ],
)
def test_bad_options(options, text):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=text):
        optim.Adam([p], **options)
    opt = optim.Adam([p])
    (name, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=text):
        setattr(opt, name, value)
    assert getattr(opt, name) is None


def test_signatures_show_the_options():
    ours, own = list(inspect.signature(optim.AdamW).parameters), ["max_norm", "ema", "state_dtype"]
    assert ours == [*inspect.signature(torch.optim.AdamW).parameters, *own]
    for name in ("LBFGS", "SparseAdam"):
        assert inspect.signature(getattr(optim, name)) == inspect.signature(getattr(torch.optim, name))

    class Own(optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.5, max_norm=1.0)

    assert list(inspect.signature(Own).parameters) == ["params"]
    assert Own([torch.nn.Parameter(torch.ones(1))]).max_norm == 1.0


def test_options_change_between_steps():
    p = torch.nn.Parameter(torch.zeros(4))
    opt = optim.SGD([p], lr=1.0)
    for max_norm, expected in ((None, -3.0), (1.5, -0.75), (0.5, -0.25), (None, -3.0), (0.0, 0.0)):
        opt.max_norm = max_norm
        with torch.no_grad():
            p.zero_()
        p.grad = torch.full((4,), 3.0)  # of norm 6
        opt.step()
        torch.testing.assert_close(p.detach(), torch.full((4,), expected))
        assert (opt.grad_norm is None) == (max_norm is None)
        if max_norm is not None:
            torch.testing.assert_close(opt.grad_norm, torch.tensor(6.0))


def test_a_sparse_gradient_is_clipped_as_a_dense_one():
    results = []
    for make in (lambda p: torch.optim.SGD(p, lr=1.0), lambda p: optim.SGD(p, lr=1.0, max_norm=0.5)):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(20, 5, sparse=True)
        opt = make(embedding.parameters())
        embedding(torch.tensor([1, 1, 7])).sum().backward()
        if isinstance(opt, optim.SGD):
            opt.step()
        else:
            embedding.weight.grad = embedding.weight.grad.to_dense()
            torch.nn.utils.clip_grad_norm_(embedding.parameters(), 0.5)
            opt.step()
        results.append(embedding.weight.detach().clone())
    torch.testing.assert_close(*results)


# --- the programs


def test_two_programs_ten_passes_and_no_array():
    """AdamW with everything on: g is read; p, m, v, g and the average are read, and all but g written."""
    model = network()
    opt = optim.AdamW(model.parameters(), lr=0.01, ema=DECAY, max_norm=1.0)
    backward(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler = amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        scaler.step(opt)
    (bucket,) = opt._plan.buckets
    (measure,), _, (update,) = opt._plan._compiled[True, True]
    n = sum(leaf.size for leaf in bucket.big) + bucket.layout.size
    first, second = measure.compiled.memory_analysis(), update.compiled.memory_analysis()
    moved = [m.argument_size_in_bytes + m.output_size_in_bytes for m in (first, second)]
    assert sum(moved) <= 10.1 * 4 * n
    assert second.alias_size_in_bytes == 4 * 4 * n
    # Of arrays only the small gradients, masked, and the coefficients of their rows; and, before jax 0.10, the squares
    # of one large gradient after the other, which its XLA does not add up in the loop that makes them.
    squares = 4 * 1.1 * max(leaf.size for leaf in bucket.big) if JAX < (0, 10) else 0
    assert first.temp_size_in_bytes <= 2 * 4 * bucket.layout.size + squares + 4096
    assert second.temp_size_in_bytes <= 2 * 4 * (len(bucket.spec.columns) + 3) * (bucket.spec.rows + 4) + 4096
    text = update.compiled.as_text()
    entry = text[text.index("ENTRY") :]
    for leaf in {leaf.size for leaf in bucket.big}:
        loops = [
            line for line in entry.splitlines() if " fusion(" in line and f"f32[{leaf}]" in line.split(" fusion(")[0]
        ]
        assert len(loops) == sum(x.size == leaf for x in bucket.big)
        assert all(line.split(" fusion(")[0].count(f"f32[{leaf}]") == 4 for line in loops)
