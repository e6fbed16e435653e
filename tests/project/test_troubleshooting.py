"""docs/troubleshooting.md: each error that it quotes is raised, or stands in the source."""

import ast
import os
import pickle
import re
import subprocess
import sys

import pytest

from tests import ROOT, child

torch = pytest.importorskip("torch", reason="most of the page is on interop")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

import interop  # noqa: E402
import jopt  # noqa: E402
from interop import amp, optim  # noqa: E402
from interop.dropin import host  # noqa: E402
from interop.runs.files import naming  # noqa: E402

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)


def parameter(shape=(2,), dtype=torch.float32, **options):
    p = torch.nn.Parameter(torch.ones(shape, dtype=dtype, **options))
    p.grad = torch.ones_like(p)
    return p


def stepped(make=optim.AdamW, **options):
    optimizer = make([parameter()], **options)
    optimizer.step()
    return optimizer


def converted():
    model = torch.nn.Linear(2, 1)
    optimizer = optim.AdamW(model.parameters())
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        model.double()


def dense_adam():
    layer = torch.nn.Embedding(3, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    optim.Adam(layer.parameters()).step()


def evaluated():
    optimizer = stepped(optim.AdamWScheduleFree)
    optimizer.eval()
    optimizer.step()


def half_state():
    optimizer = stepped()
    del optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]
    optimizer.step()


def wrong_state():
    optimizer = stepped()
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"] = torch.zeros(3)
    optimizer.step()


def without_gradients():
    optimizer, scaler = optim.SGD([parameter()]), amp.GradScaler("cpu")
    optimizer.param_groups[0]["params"][0].grad = None
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


def half_scaled():
    optimizer, scaler = optim.SGD([parameter(dtype=torch.float16)]), amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)


def scheduled():
    optimizer = interop.wrap(optax.adam(1e-3), [parameter()])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)


def unread():
    optimizer = interop.wrap(optax.adam(1e-3), [parameter()])
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()


def donated():
    tx = jopt.adamw()
    params = jnp.ones(2)
    state = tx.init(params)
    jax.jit(tx.step, donate_argnums=(1, 2))(jnp.ones(2), state, params)
    print(params)


def donated_again():
    tx = jopt.adamw()
    params = jnp.ones(2)
    state, step = tx.init(params), jax.jit(tx.step, donate_argnums=(1, 2))
    for _ in range(2):
        step(jnp.ones(2), state, params)


def stepped_before_backward():
    w, v = parameter(), parameter()
    loss = (w * v).sum()
    optim.SGD([w, v]).step()
    loss.backward()


def branching():
    tx = jopt.sgd(lr=lambda step: 0.1 if step < 10 else 0.01)
    jax.jit(tx.step)(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))


def step(tx, grads, params):
    return tx.step(grads, tx.init(params), params)


# What raises, in the page's order.
RAISED = {
    "is optax's name; torch's is": lambda: jopt.adam(learning_rate=1e-3),
    "params: expected the parameters, found None; pass them to update(grads, state, params)": lambda: (
        jopt.adam().update(jnp.ones(2), jopt.adam().init(jnp.ones(2)))
    ),
    "expected a floating point or complex type, found": lambda: jopt.adam().init(jnp.arange(3)),
    "expected the parameter's shape": lambda: step(jopt.adam(), jnp.ones(3), jnp.ones(2)),
    "expected the structure of params": lambda: step(jopt.adam(), {"w": jnp.ones(2)}, {"v": jnp.ones(2)}),
    "state: expected a jopt.State, found": lambda: jopt.adam().step(jnp.ones(2), (), jnp.ones(2)),
    "expected exp_avg, exp_avg_sq, found": lambda: jopt.adam().step(
        jnp.ones(2), jopt.sgd(momentum=0.9).init(jnp.ones(2)), jnp.ones(2)
    ),
    "object has no attribute 'step'": lambda: optax.MultiSteps(jopt.adam(), 2).step(),
    "its schedule branches on the step, which is not known while the step is compiled": branching,
    "Tried to step": lambda: jopt.schedules.one_cycle_lr(0.1, total_steps=10)(11),
    "state_dtype: expected float32, bfloat16 or int8, found float16": lambda: jopt.adam(state_dtype=jnp.float16),
    "looks at whole tensors or rows": lambda: jopt.lamb().init(jopt.pack({"w": jnp.ones((2, 2))})),
    "Error interpreting argument to": lambda: jax.jit(jnp.sin)(torch.ones(2)),
    "Array has been deleted": donated,
    "Buffer has been deleted or donated": donated_again,
    "expected a tensor in CPU memory or on a GPU, found": lambda: optim.SGD([parameter(device="meta")]).step(),
    "convert the model before the optimizer's first step, or its state with it": converted,
    "differentiable=True would need torch's autograd through a compiled step": lambda: optim.Adam(
        [parameter()], differentiable=True
    ),
    "expected a dense tensor, found layout": lambda: interop.to_jax(torch.eye(2).to_sparse()),
    "SparseAdam does not support dense gradients, please consider Adam instead": lambda: optim.SparseAdam(
        [parameter()]
    ).step(),
    "does not support sparse gradients, please consider SparseAdam instead": dense_adam,
    "Muon only supports 2D parameters whereas we found a parameter with size": lambda: optim.Muon([parameter()]),
    "Optimizer was not in train mode when step is called": evaluated,
    "max_norm: expected an argument of the optimizer, found one of a parameter group": lambda: optim.SGD(
        [{"params": [parameter()], "max_norm": 1.0}]
    ),
    "AdamW reads its state 'exp_avg', found": half_state,
    "expected its state 'exp_avg' of the parameter's shape": wrong_state,
    "No inf checks were recorded for this optimizer.": without_gradients,
    "Attempting to unscale FP16 gradients.": half_scaled,
    "step() in a forked child process": host.check_process,
    "has been modified by an inplace operation": stepped_before_backward,
    "the group has no such entry": scheduled,
    "which the transformation does not keep in its state, so that nothing would read it": unread,
    "an optimizer of interop.wrap cannot be saved whole": lambda: pickle.dumps(
        interop.wrap(optax.adam(1e-3), [parameter()])
    ),
    "would be narrowed to 32 bits while jax_enable_x64 is off": lambda: interop.to_jax(
        torch.ones(2, dtype=torch.float64)
    ),
    "cannot share its memory with JAX": lambda: interop.to_jax(torch.ones(4, 4)[:, 1:], copy=False),
    "optimizer: expected one of torch.optim's or interop.optim's, found": lambda: interop.optimizer_to_jax(
        interop.wrap(optax.adam(1e-3), [parameter()]), torch.nn.Linear(2, 1)
    ),
    "Perhaps renamed: give map=, as": lambda: naming.compare({"module.w": (2,)}, {"w": (2,)}, "the model"),
}


# What raises where there are several devices: a process of its own.
ON_SEVERAL = {
    "incompatible devices for jitted computation": """
import jax, jax.numpy as jnp
jax.jit(jnp.add)(*(jax.device_put(jnp.ones(2), device) for device in jax.devices()))
"""
}


def texts():
    """Every text of the source, with {} for what is put in."""
    for path in [*ROOT.glob("jopt/**/*.py"), *ROOT.glob("interop/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(x.value if isinstance(x, ast.Constant) else "{}" for x in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_what_is_raised_is_on_the_page():
    assert (RAISED | ON_SEVERAL).keys() <= set(QUOTED)
    assert len(QUOTED) == len(set(QUOTED)) >= 25


@pytest.mark.parametrize("quoted", [quoted for quoted in QUOTED if quoted in RAISED])
def test_quoted_errors_are_raised(quoted, monkeypatch):
    if RAISED[quoted] is host.check_process:
        monkeypatch.setattr(host, "_forked", True)  # as os.fork's hook sets it in the child
    with pytest.raises(Exception, match=re.escape(quoted)):
        RAISED[quoted]()


@pytest.mark.parametrize("quoted", ON_SEVERAL)
def test_quoted_errors_of_several_devices_are_raised(quoted):
    command = [sys.executable, "-c", ON_SEVERAL[quoted]]
    done = subprocess.run(command, env=os.environ | child.on_devices(2), capture_output=True, text=True)
    assert done.returncode == 1
    assert quoted in done.stderr


def test_the_other_quoted_errors_are_in_the_source():
    others = [quoted for quoted in QUOTED if quoted not in RAISED | ON_SEVERAL]
    found = list(texts())
    assert others
    assert [quoted for quoted in others if not any(quoted in text for text in found)] == []
