"""An optax transformation in PyTorch is that transformation in JAX, and a torch optimizer in every other respect."""

import copy
import gc
import io
import pickle
import signal
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

torch = pytest.importorskip("torch", reason="interop.wrap makes torch optimizers")

import interop  # noqa: E402
import jopt  # noqa: E402
from jopt._compat import enable_x64  # noqa: E402
from tests import cases  # noqa: E402

FAR_FROM_TORCH = {
    "lion": lambda: optax.lion(1e-2),
    "prodigy": lambda: contrib.prodigy(),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(1e-2, warmup_steps=5),
    "ademamix": lambda: contrib.ademamix(1e-2),
    "adopt": lambda: contrib.adopt(1e-2),
    "lamb": lambda: optax.lamb(1e-2),
    "galore": lambda: contrib.galore(1e-2, rank=4),
    "adabelief": lambda: optax.adabelief(1e-2),
    "novograd": lambda: optax.novograd(1e-2),
    "dog": lambda: contrib.dog(1.0),
    "momo": lambda: contrib.momo_adam(),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.sgd(1e-2)),
}


def parameters(problem):
    return {name: torch.nn.Parameter(torch.tensor(np.asarray(x))) for name, x in zip("bca", problem.start, strict=True)}


def values(params):
    return {name: p.detach().numpy().copy() for name, p in params.items()}


def grads_at(problem, step, params):
    return dict(zip("bca", problem.grads(step, [np.asarray(params[name]) for name in "bca"]), strict=True))


def loss_of(params):
    return sum((0.5 * p.pow(2).sum() for p in params.values()), torch.zeros(()))


def pure(tx, problem, steps, extra):
    params = {name: jnp.asarray(x) for name, x in zip("bca", problem.start, strict=True)}
    state = tx.init(params)
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(grads, state, params, extra):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        grads = {name: jnp.asarray(g) for name, g in grads_at(problem, i, params).items()}
        params, state = step(grads, state, params, {k: f(params) for k, f in extra.items()})
    return params, state


@pytest.mark.parametrize("dtype", cases.mostly_slow(["float64", "float32"], ["float64"]))
@pytest.mark.parametrize("name", cases.mostly_slow(FAR_FROM_TORCH, list(FAR_FROM_TORCH)[::2]))
def test_equals_optax_in_jax(name, dtype, relaxed):
    if name == "galore" and not hasattr(contrib, "galore"):
        pytest.skip("optax 0.2.8 brought it")
    tx, problem = FAR_FROM_TORCH[name](), cases.Problem(dtype, matrices=True)
    value = (
        {"value": lambda p: float(sum(np.square(np.asarray(x)).sum() for x in p.values()))} if name == "momo" else {}
    )
    params = parameters(problem)
    optimizer = interop.wrap(tx, params.items())
    for i in range(30):
        extra = {k: f(values(params)) for k, f in value.items()}
        for p, g in zip(params.values(), grads_at(problem, i, values(params)).values(), strict=True):
            p.grad = torch.tensor(g)
        optimizer.step(**extra)
    with enable_x64(dtype == "float64"):
        expected, _ = pure(tx, problem, 30, value)
    for key, x in values(params).items():
        assert cases.difference(x, expected[key]) <= cases.FRONT_ENDS[dtype] * 10, key


def test_a_jopt_transformation_takes_its_exact_step():
    problem = cases.Problem("bfloat16")
    params = {
        name: torch.nn.Parameter(interop.to_torch(jnp.asarray(x))) for name, x in zip("bca", problem.start, strict=True)
    }
    expected = {name: interop.to_jax(p) for name, p in params.items()}
    tx = jopt.adam(lr=0.02)
    optimizer = interop.wrap(tx, params.items())
    state, step = tx.init(expected), jax.jit(tx.step)
    for i in range(20):
        grads = {k: jnp.asarray(g) for k, g in grads_at(problem, i, expected).items()}
        for name, p in params.items():
            p.grad = interop.to_torch(grads[name])
        optimizer.step()
        expected, state = step(grads, state, expected)
    for name, p in params.items():
        np.testing.assert_array_equal(np.asarray(interop.to_jax(p)), np.asarray(expected[name]))


# --- hyperparameters


def test_torch_schedulers_drive_injected_hyperparameters(relaxed):
    params = {"w": torch.nn.Parameter(torch.ones(3))}
    optimizer = interop.wrap(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), params.items())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    before = 1.0
    for i in range(6):
        params["w"].grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        before -= 0.1 * 0.5 ** (i // 2)
        np.testing.assert_allclose(params["w"].detach().numpy(), before, rtol=1e-6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


@pytest.mark.parametrize("make", ["optax", "jopt"])
def test_one_cycle_cycles_the_betas(make, relaxed):
    tx = (
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
        if make == "optax"
        else jopt.adam(lr=1e-3, hyperparams_in_state=True)
    )
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = interop.wrap(tx, [w])
    theirs = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    ours, reference = (torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10) for o in (optimizer, theirs))
    for _ in range(8):
        w.grad = torch.ones(3)
        optimizer.step()
        theirs.step()
        ours.step()
        reference.step()
        for key in ("lr", "betas"):
            np.testing.assert_allclose(optimizer.param_groups[0][key], theirs.param_groups[0][key], rtol=1e-6)
    # What the step used is what the group said: Adam's first steps of a constant gradient are lr each.
    assert optimizer.param_groups[0]["betas"][1] == 0.999


def test_an_optax_schedule_shows_its_value(relaxed):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = interop.wrap(optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 0.5**count), [w])
    seen = []
    for _ in range(3):
        w.grad = torch.ones(3)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [1.0, 0.5, 0.25]
    assert w.tolist() == [-0.75] * 3


def test_groups_have_values_and_transformations_of_their_own(relaxed):
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    optimizer = interop.wrap(
        sgd, [{"params": [a]}, {"params": [b], "lr": 0.25}, {"params": [c], "tx": optax.scale(-3.0)}]
    )
    late = torch.nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [late], "lr": torch.tensor(0.5)})
    for p in (a, b, c, late):
        p.grad = torch.ones(2)
    optimizer.step()
    assert [p[0].item() for p in (a, b, c, late)] == [-1.0, -0.25, -3.0, -0.5]
    assert [group.get("lr") for group in optimizer.param_groups] == [1.0, 0.25, None, 0.5]


def test_a_hyperparameter_that_nothing_reads_is_refused():
    w = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lr'\].*inject_hyperparams"):
        interop.wrap(optax.sgd(1e-3), [{"params": [w], "lr": 1e-2}])
    optimizer = interop.wrap(optax.sgd(1e-3), [w])
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['lr'\]"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1e-2})
    assert len(optimizer.param_groups) == 1
    w.grad = torch.ones(3)
    optimizer.step()
    for name, value in [
        ("lr", 0.1),
        ("lr", 1),
        ("lr", torch.tensor(0.1)),
        ("betas", (0.9, 0.99)),
        ("wd", np.float32(1)),
    ]:
        optimizer.param_groups[0][name] = value  # as a scheduler does
        before = w.detach().clone()
        with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{name}'\].*inject_hyperparams"):
            optimizer.step()
        assert torch.equal(w, before)
        del optimizer.param_groups[0][name]
    optimizer.param_groups[0].update(name="head", frozen=False)
    optimizer.step()
    assert w[0] < before[0]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda s, optimizer: s.StepLR(optimizer, 1),
        lambda s, optimizer: s.LambdaLR(optimizer, lambda epoch: 0.5),
        lambda s, optimizer: s.ReduceLROnPlateau(optimizer),
        lambda s, optimizer: s.CosineAnnealingLR(optimizer, 3),
        lambda s, optimizer: s.CyclicLR(optimizer, 0.1, 1.0, cycle_momentum=False),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_scheduler_of_a_number_that_nothing_reads_is_told_the_remedy(schedule, loaded):
    optimizer = interop.wrap(optax.adam(0.1), [torch.nn.Parameter(torch.ones(3))])
    if loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer = copy.deepcopy(optimizer)
    with pytest.raises(KeyError, match=r"lr.*inject_hyperparams"):
        schedule(torch.optim.lr_scheduler, optimizer)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("lr", "0.1", TypeError),
        ("lr", None, TypeError),
        ("lr", [0.1], TypeError),
        ("lr", torch.ones(2), TypeError),
        ("betas", 0.9, ValueError),
        ("betas", (0.9,), ValueError),
        ("betas", (0.9, "0.99"), TypeError),
    ],
)
def test_a_hyperparameter_that_is_no_number_is_named(name, value, error):
    """Also in a later group; the groups before it are not stepped."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = interop.wrap(optax.inject_hyperparams(optax.adam)(0.1), [{"params": [p]} for p in params])
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(3)
        kept, optimizer.param_groups[1][name] = optimizer.param_groups[1][name], value
        before = [p.detach().clone() for p in params]
        with pytest.raises(error, match=rf"param_groups\[1\]\['{name}'\]: expected"):
            optimizer.step()
        assert all(map(torch.equal, params, before))
        optimizer.param_groups[1][name] = kept
        optimizer.step()
    del optimizer.param_groups[1][name]
    with pytest.raises(ValueError, match=rf"param_groups\[1\]: expected '{name}', which the transformation keeps"):
        optimizer.step()


def test_what_schedulers_keep_in_a_group_is_theirs():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = interop.wrap(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9), [w])
    schedulers = torch.optim.lr_scheduler
    for make in (
        lambda: schedulers.OneCycleLR(optimizer, 0.1, total_steps=9),
        lambda: schedulers.CyclicLR(optimizer, 0.01, 0.1),
        lambda: schedulers.CosineAnnealingWarmRestarts(optimizer, 3),
        lambda: torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05),
    ):
        scheduler = make()
        for _ in range(3):
            w.grad = torch.ones(3)
            optimizer.step()
            scheduler.step()


def test_saving_an_optimizer_whole_says_what_can_be_saved():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = interop.wrap(optax.adam(0.1), [w])
    w.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(TypeError, match=r"its transformation is made of functions.*state_dict\(\).*load_state_dict"):
        torch.save(optimizer, io.BytesIO())
    other = copy.deepcopy(optimizer)
    assert other.tx is optimizer.tx
    torch.save(optimizer.state_dict(), io.BytesIO())


def test_a_transformation_of_module_functions_is_saved_whole():
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = interop.wrap(optax.GradientTransformation(_init, _negative), [w])
    other = pickle.loads(pickle.dumps(optimizer))
    for opt in (optimizer, other):
        p = opt.param_groups[0]["params"][0]
        p.grad = torch.ones(3)
        opt.step()
        assert p.tolist() == [0.0] * 3


def _init(params):
    return ()


def _negative(updates, state, params=None):
    return jax.tree.map(jnp.negative, updates), state


def test_masks_see_the_names():
    model = torch.nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mask = lambda params: {name: name == "weight" for name in params}  # noqa: E731
    optimizer = interop.wrap(optax.adamw(0.1, weight_decay=0.5, mask=mask), model.named_parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before["weight"] * 0.95)
    assert torch.equal(model.bias, before["bias"])


# --- gradients


def test_a_parameter_without_gradient_is_left_alone():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = interop.wrap(optax.adam(0.1), [a, b])
    a.grad = b.grad = torch.ones(2)
    optimizer.step()
    kept, moments = b.detach().clone(), {k: x.clone() for k, x in optimizer.state[b].items()}
    b.grad = None
    optimizer.step()
    assert torch.equal(b, kept)
    assert set(moments) == {"0.mu", "0.nu"}
    for key, x in moments.items():
        assert torch.equal(optimizer.state[b][key], x)
    assert optimizer.state[a]["0.count"] == 2
    a.grad = None
    optimizer.step()  # nothing has a gradient: no step
    assert optimizer.state[a]["0.count"] == 2


def test_first_step_with_a_frozen_parameter_can_be_saved_and_unfrozen():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = interop.wrap(optax.adam(0.1), [a, b])
    a.grad = torch.ones(2)
    optimizer.step()
    assert b.tolist() == [1.0, 1.0]
    b.grad = torch.ones(2)
    optimizer.step()
    assert b[0] < 1


class Overriding(torch.Tensor):
    """With operations of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("bad", ["sparse", "subclass"])
def test_a_bad_gradient_changes_nothing(bad):
    a, b = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = interop.wrap(optax.adam(0.1), [{"params": [a]}, {"params": [b]}])
    a.grad = torch.ones(2, 2)
    if bad == "sparse":
        b.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (2, 2), check_invariants=True)
    else:
        b.grad = torch.ones(2, 2).as_subclass(Overriding)
    with pytest.raises(TypeError, match=r"the gradient of param_groups\[1\]\['params'\]\[0\]"):
        optimizer.step()
    assert a.tolist() == [[1.0, 1.0]] * 2
    assert not optimizer.state


@pytest.mark.parametrize("tx", [0.1, torch.optim.SGD, None])
def test_no_transformation(tx):
    with pytest.raises(TypeError, match=r"optax\.GradientTransformation"):
        interop.wrap(tx, [torch.nn.Parameter(torch.ones(2))])


def test_results_share_no_memory():
    """A state that begins as the parameters, or as another part of the state, is memory of its own in torch."""
    tx = optax.GradientTransformation(lambda p: (p, p), lambda u, s, p: (u, (s[0], s[0])))
    w = torch.nn.Parameter(torch.arange(3.0))
    optimizer = interop.wrap(tx, [w])
    for _ in range(2):
        w.grad = torch.ones(3)
        optimizer.step()
        tensors = [w, *optimizer.state[w].values()]
        assert len({x.data_ptr() for x in tensors}) == 3
    optimizer.state[w]["0"].zero_()
    assert optimizer.state[w]["1"].tolist() == [0.0, 1.0, 2.0]


# --- closures and extra arguments


def test_a_line_search_calls_the_closure(relaxed):
    """optax.lbfgs with its zoom line search, against the same in JAX."""
    scale = np.linspace(1, 30, 6).astype(np.float32)
    w = torch.nn.Parameter(torch.ones(6))
    tx = optax.lbfgs()
    optimizer = interop.wrap(tx, [w])
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = (torch.tensor(scale) * (w - 0.3) ** 2).sum() + (w**4).sum()
        loss.backward()
        return loss

    def f(x):
        return (scale * (x["param_0"] - 0.3) ** 2).sum() + (x["param_0"] ** 4).sum()

    params = {"param_0": jnp.ones(6)}
    state = tx.init(params)
    for _ in range(5):
        value, grad = jax.value_and_grad(f)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=f)
        params = optax.apply_updates(params, updates)
        loss = optimizer.step(closure)
        assert loss.item() == pytest.approx(float(value), rel=1e-4)
    assert len(calls) > 5
    assert cases.difference(w.detach().numpy(), params["param_0"]) <= cases.NETWORK["float32"]


def test_an_error_in_the_closure_restores_the_parameters():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = interop.wrap(optax.lbfgs(), [w])
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise ArithmeticError("in the closure")
        optimizer.zero_grad()
        loss = w.pow(4).sum()
        loss.backward()
        return loss

    with pytest.raises(ArithmeticError, match="in the closure"):
        optimizer.step(closure)
    assert w.tolist() == [1.0, 1.0]
    assert not optimizer.state


def test_sam_asks_for_gradients_elsewhere(relaxed):
    tx = contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05)), opaque_mode=True)
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = interop.wrap(tx, [w])

    def closure():
        optimizer.zero_grad()
        loss = (w**4).sum()
        loss.backward()
        return loss

    params = {"param_0": jnp.array([1.0, 2.0])}
    state, grad = tx.init(params), jax.grad(lambda p: (p["param_0"] ** 4).sum())
    for _ in range(3):
        updates, state = tx.update(grad(params), state, params, grad_fn=lambda p, _: grad(p))
        params = optax.apply_updates(params, updates)
        optimizer.step(closure)
    assert cases.difference(w.detach().numpy(), params["param_0"]) <= cases.FRONT_ENDS["float32"]


def test_a_function_of_jax_is_an_extra_argument(relaxed):
    """Sophia differentiates its objective twice, which only a function in JAX can offer."""
    tx = contrib.sophia(1e-2)
    problem, w = (lambda p: (p["param_0"] ** 4).sum()), torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = interop.wrap(tx, [w])
    params = {"param_0": jnp.array([1.0, 2.0])}
    state = tx.init(params)
    for _ in range(12):
        updates, state = tx.update(jax.grad(problem)(params), state, params, obj_fn=problem)
        params = optax.apply_updates(params, updates)
        w.grad = 4 * w.detach() ** 3
        optimizer.step(obj_fn=problem)
    assert cases.difference(w.detach().numpy(), params["param_0"]) <= cases.FRONT_ENDS["float32"]


# --- schedule-free


def test_eval_shows_the_average_and_train_puts_back():
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = interop.wrap(contrib.schedule_free_sgd(0.1), [w])
    optimizer.eval()  # before any step there is no average
    optimizer.train()
    average = z = np.ones(4)
    for i in range(5):
        w.grad = w.detach().clone()
        z = z - 0.1 * w.grad.numpy()
        average = average + (z - average) / (i + 1)
        optimizer.step()
    trained = w.detach().clone()
    optimizer.eval()
    np.testing.assert_allclose(w.detach().numpy(), average, rtol=1e-5)
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        optimizer.state_dict()
    optimizer.train()
    assert torch.equal(w, trained)
    optimizer.step()


# --- checkpoints


def test_a_checkpoint_goes_on_where_it_was(relaxed):
    """Through torch.save and weights_only; bfloat16 parameters keep counts and float32 moments."""

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
        inner = optax.chain(optax.add_noise(1e-3, 0.5, key=1), optax.scale_by_adam(mu_dtype=jnp.float32))
        tx = optax.inject_hyperparams(lambda learning_rate: optax.chain(inner, optax.scale(-learning_rate)))(1e-2)
        optimizer = interop.wrap(tx, model.named_parameters())
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

    def train(model, optimizer, scheduler, steps):
        for i in steps:
            optimizer.zero_grad()
            model(torch.full((2, 4), 0.1 * i, dtype=torch.bfloat16)).pow(2).sum().backward()
            optimizer.step()
            scheduler.step()

    straight, stopped, resumed = fresh(), fresh(), fresh()
    train(*straight, range(300))
    train(*stopped, range(270))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in stopped], file)
    file.seek(0)
    for x, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        x.load_state_dict(state)
    train(*resumed, range(270, 300))
    for p, q in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        for key, x in straight[1].state[p].items():
            assert resumed[1].state[q][key].dtype == x.dtype
            assert torch.equal(resumed[1].state[q][key], x), key


def test_a_state_of_another_transformation_is_refused():
    w = torch.nn.Parameter(torch.ones(2))
    adam, lion = interop.wrap(optax.adam(0.1), [w]), interop.wrap(optax.lion(0.1, mu_dtype=jnp.bfloat16), [w])
    w.grad = torch.ones(2)
    adam.step()
    before = w.detach().clone()
    lion.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match=r"'param_0': expected '0.mu' of torch.bfloat16"):
        lion.step()
    assert torch.equal(w, before)


def test_external_edits_of_the_state_are_seen():
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = interop.wrap(optax.trace(0.5), [w])
    w.grad = torch.ones(2)
    optimizer.step()
    optimizer.state[w]["trace"].fill_(10.0)
    optimizer.step()
    assert w.tolist() == [1.0 + 6.0] * 2


def test_a_deepcopy_is_independent():
    model = torch.nn.Linear(2, 2)
    optimizer = interop.wrap(optax.inject_hyperparams(optax.adam)(learning_rate=0.1), model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    before = model.weight.detach().clone()
    model2(torch.ones(1, 2)).sum().backward()
    optimizer2.step()
    assert torch.equal(model.weight, before)
    assert not torch.equal(model2.weight, before)


def test_hooks_zero_grad_and_repr():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = interop.wrap(optax.sgd(0.1), [w])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    w.grad = torch.ones(2)
    optimizer.step()
    optimizer.zero_grad()
    assert seen == ["before", "after"]
    assert w.grad is None
    assert "interop.wrap" in repr(optimizer)


# --- the demo's model


@pytest.mark.slow
@pytest.mark.parametrize("name", [*list(FAR_FROM_TORCH)[:7], "sophia"])
def test_the_demo_model_trains_as_in_jax(name, relaxed, x64):
    from torch.nn import functional

    from examples import digits

    x, y = digits.load(None, 8)
    x = x.astype(np.float64)

    def loss_fn(params, x, y):
        logits = jax.nn.log_softmax(digits.apply(params, x))
        return -jnp.mean(jnp.take_along_axis(logits, y[:, None], axis=1))

    torch.manual_seed(0)
    model = digits.CNN(1, (8, 8), 10).double()
    make = {
        **FAR_FROM_TORCH,
        "sophia": lambda: contrib.sophia(1e-3),
        "galore": lambda: contrib.galore(2e-3, rank=4),
        "lion": lambda: optax.lion(3e-4),
        "ademamix": lambda: contrib.ademamix(1e-3),
        "adopt": lambda: contrib.adopt(2e-3),
    }
    tx = make[name]()
    optimizer = interop.wrap(tx, model.named_parameters())
    params = interop.to_jax(dict(model.named_parameters()))
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        extra = {"obj_fn": lambda p: loss_fn(p, x, y)} if name == "sophia" else {}
        updates, state = optax.with_extra_args_support(tx).update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for i, batch in enumerate(digits.batches(len(x), 2)):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(torch.from_numpy(x[batch])), torch.from_numpy(y[batch]).long())
        loss.backward()
        extra = {"obj_fn": lambda p, b=batch: loss_fn(p, x[b], y[b])} if name == "sophia" else {}
        optimizer.step(**extra)
        losses.append(loss.item())
        if i < 10:
            params, state, value = step(params, state, x[batch], y[batch])
            assert losses[-1] == pytest.approx(float(value), rel=cases.NETWORK["float64"])
        elif name == "sophia":
            break  # each step compiles its objective anew
    assert np.mean(losses[-5:]) < 0.9 * losses[0] or name in ("prodigy", "sophia")


# --- what is torch's of jopt's own transformations


def missing_sometimes(make):
    """Two parameters, of which one has no gradient in the first steps."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    optimizer = make(params)
    for i in range(8):
        params[0].grad = torch.full_like(params[0], 0.1 * (i + 1))
        params[1].grad = torch.full_like(params[1], 0.3 * (i - 5)) if i >= 5 else None
        optimizer.step()
    return torch.stack([p.detach() for p in params])


@pytest.mark.parametrize("wrapped", [lambda tx: tx, lambda tx: jopt.chain(jopt.clip_grad_norm(1e9), tx), jopt.monitor])
@pytest.mark.parametrize(
    "name", cases.mostly_slow(["Adam", "NAdam", "RAdam", "ASGD", "Adamax", "Adagrad"], ["Adam", "NAdam", "ASGD"])
)
def test_a_missing_gradient_is_torchs(name, wrapped):
    tx = wrapped(getattr(jopt, name.lower())(lr=0.1))
    expected = missing_sometimes(lambda params: getattr(torch.optim, name)(params, lr=0.1))
    found = missing_sometimes(lambda params: interop.wrap(tx, params))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("chain", [optax.chain, jopt.chain])
def test_further_arguments_reach_what_is_inside(chain, relaxed):
    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda x: x * value, updates), state

    scaled = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = interop.wrap(chain(scaled, jopt.sgd(lr=0.5)), [p])
    p.grad = torch.ones(2)
    optimizer.step(value=3.0)
    assert p.tolist() == [-1.5, -1.5]

    def closure():
        p.grad = torch.ones(2)
        return torch.tensor(2.0)

    optimizer.step(closure)
    assert p.tolist() == [-2.5, -2.5]


SCHEDULED = {
    "optax": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0.25, 1.0, 3)),
    "jopt": lambda: jopt.sgd(lr=jopt.schedules.linear_lr(1.0, 0.25, 1.0, 3), hyperparams_in_state=True),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_what_a_schedule_sets_is_shown_and_not_to_be_set(name, relaxed):
    tx = SCHEDULED[name]()
    text = r"param_groups\[\d\]: found lr of .* which the transformation's own schedule sets, to .* now"
    p, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    with pytest.raises(ValueError, match=text):
        interop.wrap(tx, [{"params": [p], "lr": 0.5}])
    optimizer = interop.wrap(tx, [p])
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": [other], "lr": 0.5})
    p.grad = torch.ones(2)
    shown = []
    for _ in range(3):
        optimizer.step()
        shown.append(optimizer.param_groups[0]["lr"])
    assert shown == [0.25, 0.5, 0.75]

    again = interop.wrap(tx, [torch.nn.Parameter(p.detach().clone())])
    again.load_state_dict(optimizer.state_dict())
    again.param_groups[0]["params"][0].grad = torch.ones(2)
    for optimizer_ in (optimizer, again, copy.deepcopy(optimizer)):
        optimizer_.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer_.step()
        assert optimizer_.param_groups[0]["lr"] == 1.0

    before = p.detach().clone()
    for value in (0.5, torch.tensor(0.5)):  # as a torch scheduler would
        optimizer.param_groups[0]["lr"] = value
        with pytest.raises(ValueError, match=text):
            optimizer.step()
    assert torch.equal(p, before)


# --- in place


def stepped(optimizer, params, grads=1.0, **extra):
    for p in params:
        p.grad = torch.full_like(p, grads)
    optimizer.step(**extra)


def test_a_step_writes_where_parameters_and_state_lie(relaxed):
    params = [torch.nn.Parameter(torch.ones(s)) for s in ((256, 128), (7,), ())]
    optimizer = interop.wrap(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), params)
    stepped(optimizer, params)
    tensors = [*params, *(x for p in params for x in optimizer.state[p].values())]
    before = [(x.data_ptr(), x._version, x.detach().clone()) for x in tensors]
    held = [x.buffer.array.unsafe_buffer_pointer() for x in optimizer._groups[0]._held.params]
    assert held == [p.data_ptr() for p in params]
    for _ in range(3):
        stepped(optimizer, params)
    after = [*params, *(x for p in params for x in optimizer.state[p].values())]
    assert all(x is y for x, y in zip(tensors, after, strict=True))
    for x, (address, version, value) in zip(tensors, before, strict=True):
        assert x.data_ptr() == address
        assert not torch.equal(x, value)
        assert x._version > version or not x.requires_grad
    loss = params[0].pow(2).sum()
    stepped(optimizer, params)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def aliased(p):
    return [p.detach()[:2]]


def shared(p):
    p.share_memory_()


def of_numpy(p):
    p.data = torch.from_numpy(array := np.ones(tuple(p.shape), np.float32))
    return array


def channels_last(p):
    p.data = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)


def stepped_by_another(p):
    other = interop.optim.SGD([p], lr=0.0)
    p.grad = torch.ones_like(p)
    other.step()
    return other


@pytest.mark.parametrize("bind", [aliased, shared, of_numpy, channels_last, stepped_by_another])
def test_a_parameter_whose_memory_others_have_stays_there(bind, relaxed):
    p, q = torch.nn.Parameter(torch.ones(8, 8)), torch.nn.Parameter(torch.ones(3))
    kept = bind(p)
    address, strides = p.data_ptr(), p.stride()
    optimizer = interop.wrap(optax.inject_hyperparams(optax.sgd)(0.25), [p, q])
    for i in range(3):
        stepped(optimizer, [p, q])
        assert (p.data_ptr(), p.stride()) == (address, strides)
        assert torch.equal(p, torch.full_like(p, 0.75 - 0.25 * i))
        assert torch.equal(q, torch.full_like(q, 0.75 - 0.25 * i))
    if bind is aliased:
        assert torch.equal(kept[0], p[:2])
    if bind is of_numpy:
        assert (kept == 0.25).all()


def test_a_parameter_that_leaves_its_place_is_followed(relaxed):
    p, q = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    optimizer = interop.wrap(optax.sgd(0.25), [p, q])
    stepped(optimizer, [p, q])
    old = p.detach()
    p.data = torch.full((8, 8), 5.0)
    stepped(optimizer, [p, q])
    assert (old == 0.75).all()
    assert (p == 4.75).all()
    assert (q == 0.5).all()
    p.data = p.data.t()  # the same address, read in another order
    p.data[0, 1] = 9.0
    stepped(optimizer, [p, q])
    assert p[0, 1] == 8.75
    assert p[1, 0] == 4.5
    assert (q == 0.25).all()


def test_state_that_parameters_exchange_is_exchanged(relaxed):
    p, q = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    optimizer = interop.wrap(optax.trace(0.5), [p, q])
    p.grad, q.grad = torch.ones(4), torch.full((4,), 8.0)
    optimizer.step()
    kept = optimizer.state[p]["trace"]
    optimizer.state[p]["trace"], optimizer.state[q]["trace"] = optimizer.state[q]["trace"], kept
    optimizer.step()
    assert optimizer.state[p]["trace"].tolist() == [5.0] * 4
    assert optimizer.state[q]["trace"].tolist() == [8.5] * 4
    assert kept.tolist() == [1.0] * 4  # whoever holds it has what it held


def test_an_array_over_old_state_keeps_its_values(relaxed):
    p = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = interop.wrap(optax.trace(1.0), [p])
    stepped(optimizer, [p])
    array = interop.to_jax(optimizer.state[p]["trace"])
    snapshot = optimizer.state_dict()
    stepped(optimizer, [p])
    assert (np.asarray(array) == 1.0).all()
    optimizer.load_state_dict(snapshot)
    stepped(optimizer, [p])
    assert (optimizer.state[p]["trace"] == 3.0).all()  # as in torch, a state_dict's tensors are the optimizer's own


def test_gradients_of_any_layout(relaxed):
    p = torch.nn.Parameter(torch.zeros(6, 4))
    z = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = interop.wrap(optax.sgd(1.0), [p, z])
    value = torch.arange(24.0)
    given = torch.tensor([1j, 2.0, 3 + 1j])
    for grad in (
        value.view(4, 6).t(),
        value.view(6, 4)[:, torch.tensor([3, 2, 1, 0])],
        torch.ones(1).expand(6, 4),
        torch.cat([torch.zeros(1), value])[1:].view(6, 4),  # 4 bytes past where JAX takes memory as it is
    ):
        p.grad, z.grad = grad, given.conj()
        optimizer.step()
        assert torch.equal(p, -grad)
        assert torch.equal(z, -given.conj())
        with torch.no_grad():
            p.zero_(), z.zero_()


def test_an_error_inside_of_a_step_loses_nothing(relaxed):
    """Python runs inside of the program, and raises."""
    fails = [False]

    def checked(x):
        if fails[0]:
            raise ValueError("not this time")
        return x

    def update(grads, state, params=None):
        seen = jax.pure_callback(checked, jax.eval_shape(lambda: state), state)
        return jax.tree.map(jnp.negative, grads), jax.tree.map(lambda x: x + 1, seen)

    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = interop.wrap(optax.GradientTransformation(lambda params: jnp.zeros(3), update), [p])
    stepped(optimizer, [p])
    fails[0] = True
    with pytest.raises(Exception, match="not this time"):
        stepped(optimizer, [p])
    assert p.tolist() == [-1.0] * 4
    assert [x.tolist() for x in optimizer.state[p].values()] == [[1.0] * 3]
    fails[0] = False
    stepped(optimizer, [p])
    assert p.tolist() == [-2.0] * 4
    assert [x.tolist() for x in optimizer.state[p].values()] == [[2.0] * 3]


def test_an_update_of_another_shape_is_named_before_anything_changes():
    p = torch.nn.Parameter(torch.zeros(4))
    tx = optax.GradientTransformation(lambda params: {"seen": jnp.zeros(1)}, lambda u, s, p: (u, {"seen": jnp.ones(2)}))
    optimizer = interop.wrap(tx, [p])
    with pytest.raises(ValueError, match=r"tx: expected .* 'seen', float32 of shape \(1,\), found .* shape \(2,\)"):
        stepped(optimizer, [p])
    assert p.tolist() == [0.0] * 4
    assert not optimizer.state


def test_all_is_donated_and_nothing_as_large_is_made_beside_it(relaxed):
    params = [torch.nn.Parameter(torch.ones(256, 256)) for _ in range(3)]
    optimizer = interop.wrap(optax.chain(optax.clip(1.0), optax.lion(1e-2)), params)
    stepped(optimizer, params)
    [program] = optimizer._groups[0]._programs.values()
    found = program.run.compiled.memory_analysis()
    size = sum(p.nbytes for p in params)
    assert found.alias_size_in_bytes >= 2 * size
    assert found.temp_size_in_bytes <= 0.02 * size


def test_it_is_freed_with_its_last_reference(relaxed):
    """Without the collector of cycles: a model's memory is not to wait for that."""

    def trained():
        params = [torch.nn.Parameter(torch.ones(64, 64)), torch.nn.Parameter(torch.ones(3))]
        optimizer = interop.wrap(optax.lion(0.1), params)
        stepped(optimizer, params)
        stepped(optimizer, params, closure=lambda: sum(p.sum() for p in params))
        params[1].grad = None
        optimizer.step()
        held = optimizer._groups[0]._held
        return [weakref.ref(x) for x in (held, held.params[0].buffer, held.state[0].buffer, params[0])]

    torch.optim.SGD([torch.zeros(1)])  # of the first in a process torch keeps frames, in the errors of its imports
    gc.disable()
    try:
        assert not any(x() is not None for x in trained())
    finally:
        gc.enable()


UNREAD = {
    "last": lambda: optax.chain(
        optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda u, s, p=None: (u, u)),
        optax.trace(0.9),
    ),
    "snapshot": lambda: optax.chain(optax.snapshot("grads", lambda u: u), optax.sgd(0.1, momentum=0.9)),
    "jopt": lambda: jopt.chain(jopt.clip_grad_norm(0.3), jopt.adamw(lr=0.1)),
}


@pytest.mark.parametrize("name", UNREAD)
def test_state_that_an_update_does_not_read_has_its_own_place(name, relaxed):
    """JAX gives a donated array to the next result of its shape: were one left out, all after it would be shifted."""
    tx = UNREAD[name]()
    params = [torch.nn.Parameter(torch.full(s, 2.0)) for s in ((40, 40), ())]
    optimizer = interop.wrap(tx, params)
    ours = {f"param_{i}": jnp.full(p.shape, 2.0) for i, p in enumerate(params)}
    state = tx.init(ours)

    @jax.jit
    def step(grads, state, params):
        if name == "jopt":
            return tx.step(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(3):
        ours, state = step(jax.tree.map(lambda x, i=i: jnp.full(x.shape, 1.0 + i), ours), state, ours)
        stepped(optimizer, params, 1.0 + i)
        held = optimizer._groups[0]._held
        assert not any(x.buffer.array.is_deleted() for x in held.state)
        arrays, _ = held.layout.parted(state)
        for x, y in zip(
            [p.detach() for p in params] + [x.view for x in held.state], [*ours.values(), *arrays], strict=True
        ):
            np.testing.assert_allclose(x.numpy(), y, rtol=1e-6)


@pytest.mark.parametrize("move", ["data", "set_", "share_memory_"])
def test_state_that_leaves_its_memory_is_followed(move, relaxed):
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = interop.wrap(optax.trace(0.5), [p])
    stepped(optimizer, [p])
    x = optimizer.state[p]["trace"]
    if move == "data":
        x.data = torch.full((4,), 10.0)
    elif move == "set_":
        x.set_(torch.full((4,), 10.0))
    else:
        x.share_memory_()
        x.fill_(10.0)
    for _ in range(2):
        stepped(optimizer, [p])
    assert p.tolist() == [1.0 + 6.0 + 4.0] * 4
    assert optimizer.state[p]["trace"].tolist() == [4.0] * 4


def test_an_integer_hyperparameter_takes_no_fraction(relaxed):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = interop.wrap(optax.inject_hyperparams(optax.sgd)(learning_rate=1), [{"params": [p], "lr": 0.5}])
    with pytest.raises(ValueError, match=r"lr: expected an integer.* found 0.5; make it with 0.5"):
        stepped(optimizer, [p])
    assert p.tolist() == [0.0, 0.0]


def test_a_parameter_without_gradient_is_not_written(relaxed):
    base = torch.zeros(4)
    p, q = torch.nn.Parameter(base), torch.nn.Parameter(base[:2])
    optimizer = interop.wrap(optax.sgd(1.0), [p, q])
    version = q._version
    p.grad = torch.ones(4)
    optimizer.step()
    assert p.tolist() == [-1.0] * 4  # q shows two of them
    other = torch.nn.Parameter(torch.ones(4)[:2])
    optimizer = interop.wrap(optax.sgd(1.0), [other, torch.nn.Parameter(torch.ones(1))])
    version = other._version
    optimizer.param_groups[0]["params"][1].grad = torch.ones(1)
    optimizer.step()
    assert other._version == version


def test_all_groups_are_checked_before_one_steps(relaxed):
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = interop.wrap(optax.adam(0.1), [{"params": [a]}, {"params": [b]}])
    stepped(optimizer, [a, b])
    before = a.detach().clone()
    optimizer.state[b]["0.mu"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"0\.mu"):
        stepped(optimizer, [a, b])
    assert torch.equal(a, before)


@pytest.fixture
def interruptible():
    """A background job starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_finds_the_old_step_or_the_new(monkeypatch, relaxed, interruptible):
    from interop.wrapping import held

    base = torch.zeros(4)
    p, q = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(base[:2])  # the second is copied in and out
    optimizer = interop.wrap(optax.trace(1.0), [{"params": [p, q]}])
    launch = held.launch

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return launch(*args)

    for i in range(2):
        monkeypatch.setattr(held, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stepped(optimizer, [p, q])
        monkeypatch.setattr(held, "launch", launch)
        assert torch.equal(p, q)
        assert optimizer.state[p]["trace"].tolist() == [2.0 * i + 1] * 2
        stepped(optimizer, [p, q])
    assert p.tolist() == q.tolist() == [1.0 + 2 + 3 + 4] * 2


def test_a_kept_state_dict_survives_a_cleared_state(relaxed):
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = interop.wrap(optax.trace(1.0), [p])
    stepped(optimizer, [p])
    stepped(optimizer, [p])
    kept = optimizer.state_dict()["state"][0]["trace"]
    optimizer.state.clear()
    stepped(optimizer, [p])
    assert kept.tolist() == [2.0] * 4
    assert optimizer.state[p]["trace"].tolist() == [1.0] * 4


def test_eval_before_a_step_changes_nothing_and_loading_while_in_eval_is_refused(relaxed):
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = interop.wrap(contrib.schedule_free_adamw(0.1), [p])
    optimizer.eval()
    stepped(optimizer, [p])
    trained = p.detach().clone()
    stepped(optimizer, [p])
    snapshot = optimizer.state_dict()
    optimizer.eval()
    assert not torch.equal(p, trained)
    with pytest.raises(RuntimeError, match=r"call train\(\) first"):
        optimizer.load_state_dict(snapshot)
    optimizer.train()
    optimizer.load_state_dict(snapshot)


def test_a_conjugated_parameter_is_stepped_as_it_reads(relaxed):
    p = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    optimizer = interop.wrap(optax.sgd(1.0), [p])
    p.grad = torch.zeros(2, dtype=p.dtype)
    optimizer.step()
    p.data = p.data.conj()
    p.grad = torch.full((2,), 1j)
    optimizer.step()
    assert p.detach().resolve_conj().tolist() == [1 - 3j, 3 + 0j]


def test_gradients_are_those_where_the_step_began(relaxed):
    """A closure that a line search calls writes to the same gradients."""
    found = []
    for set_to_none in (True, False):
        a, b = torch.nn.Parameter(torch.full((3,), 2.0)), torch.nn.Parameter(torch.ones(2))
        optimizer = interop.wrap(optax.sgd(1.0), [{"params": [a], "tx": optax.lbfgs()}, {"params": [b]}])

        def closure(a=a, b=b, optimizer=optimizer, set_to_none=set_to_none):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = (a**2).sum() + (a.sum() * b).sum()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
        found.append([*a.tolist(), *b.tolist()])
    assert found[0] == found[1]


def test_what_else_torch_takes(relaxed):
    """An empty group, complex parameters with hyperparameters in the state."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = interop.wrap(optax.sgd(1.0), [{"params": [p]}, {"params": []}])
    stepped(optimizer, [p])
    z = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = interop.wrap(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5), [z])
    for _ in range(2):
        z.grad = torch.full((2,), 1j)
        optimizer.step()
    assert z.tolist() == [-1j] * 2
    assert optimizer.param_groups[0]["lr"] == 0.5
