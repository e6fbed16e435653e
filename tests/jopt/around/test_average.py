"""Averages are AveragedModel's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jopt
from tests import cases

torch = pytest.importorskip("torch", reason="the truth is torch's")
from torch.optim import swa_utils  # noqa: E402

import interop  # noqa: E402
from jopt._compat import enable_x64  # noqa: E402


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["swa", "ema", "ema-fast", "ema-single"])
def test_averages_are_averaged_models(kind, dtype):
    model = torch.nn.Linear(8, 16, dtype=getattr(torch, dtype))
    options = {
        "swa": {},
        "ema": dict(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.99)),
        "ema-fast": dict(multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.3)),
        "ema-single": dict(avg_fn=swa_utils.get_ema_avg_fn(0.9)),
    }
    averaged = swa_utils.AveragedModel(model, **options[kind])
    average = {"swa": jopt.swa(), "ema": jopt.ema(0.99), "ema-fast": jopt.ema(0.3), "ema-single": jopt.ema(0.9)}[kind]
    with enable_x64(dtype == "float64"):
        state, update = average.init(interop.to_jax(dict(model.named_parameters()))), jax.jit(average.update)
        for i in range(20):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype))
            averaged.update_parameters(model)
            state = update(interop.to_jax(dict(model.named_parameters())), state)
    assert state.n_averaged.item() == averaged.n_averaged.item() == 20
    for name, p in averaged.module.named_parameters():
        assert state.params[name].dtype == dtype
        # torch's function for one tensor (ema-single) multiplies twice where lerp does once.
        assert cases.difference(state.params[name], np.asarray(p.detach().double())) <= cases.CLIPPED[dtype] * 20


def test_integers_follow_torchs_average():
    """As with use_buffers=True: batch norm counts its batches."""
    averaged, average = torch.tensor(10), jopt.ema(0.5)
    state = average.update({"n": jnp.asarray(10)}, average.init({"n": jnp.asarray(0)}))
    for n in (13, 20):
        swa_utils.get_ema_multi_avg_fn(0.5)([averaged], [torch.tensor(n)], 1)
        state = average.update({"n": jnp.asarray(n)}, state)
        assert state.params["n"].item() == averaged.item()
        assert state.params["n"].dtype == jnp.int32


def test_init_owns_its_memory():
    params = jnp.ones(3)
    state = jopt.ema().init(params)
    assert state.params.unsafe_buffer_pointer() != params.unsafe_buffer_pointer()


def test_swa_is_the_mean_and_ema_of_a_constant_is_it():
    values = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    swa, ema = jopt.swa(), jopt.ema(0.9)
    a, b = swa.init(jnp.zeros(4)), ema.init(jnp.zeros(4))
    for x in values:
        a, b = swa.update(jnp.asarray(x), a), ema.update(jnp.ones(4), b)
    np.testing.assert_allclose(a.params, values.mean(0), rtol=1e-5, atol=1e-6)
    assert b.params.tolist() == [1.0] * 4


def test_update_bn_is_torchs():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    batches = [torch.randn(n, 3) for n in (16, 16, 8)]
    swa_utils.update_bn([(x,) for x in batches], model)
    w, b = (interop.to_jax(p) for p in model[0].parameters())

    @jax.jit
    def statistics(x):
        x = x @ w.T + b[None]
        return {"mean": x.mean(0), "var": x.var(0, ddof=1)}

    found = jopt.update_bn(statistics, [jnp.asarray(x.numpy()) for x in batches])
    assert cases.difference(found["mean"], model[1].running_mean.numpy()) <= cases.FRONT_ENDS["float32"]
    assert cases.difference(found["var"], model[1].running_var.numpy()) <= cases.FRONT_ENDS["float32"]


def test_bad_input():
    with pytest.raises(ValueError, match=r"Invalid decay value 1.5 provided. Please provide a value in \[0,1\] range."):
        jopt.ema(1.5)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        jopt.update_bn(lambda x: x, [])
    average = jopt.swa()
    with pytest.raises(ValueError, match="params: expected the structure"):
        average.update({"b": jnp.ones(1)}, average.init({"a": jnp.ones(1)}))
