"""A user's program, for pyright --strict: tests/project/test_wheel.py checks it beside the installed wheel."""

from typing import Any, assert_type

import jax
import optax  # pyright: ignore[reportMissingTypeStubs]
import torch

import interop
import jopt
from interop import amp, optim

# --- in JAX

key = jax.random.key(0)
params: dict[str, jax.Array] = {"w": jax.random.normal(key, (2, 3)), "b": jax.random.normal(key, (3,))}
tx = jopt.adamw(lr=1e-3, betas=(0.9, 0.99), weight_decay=jopt.schedules.step_lr(0.1, 3))
assert_type(tx, jopt.Transform)
state = tx.init(params)
assert_type(state, jopt.State)
params, state = tx.step(params, state, params)
assert_type(params, dict[str, jax.Array])
assert_type(state, jopt.State)
updates, state = tx.update(params, state, params)
assert_type(state, jopt.State)
assert_type(state.count, jax.Array)

chain = jopt.chain(jopt.clip_grad_norm(1.0), tx)
assert_type(chain, jopt.Chain)
params, chain_state = chain.step(params, chain.init(params), params)
assert_type(chain_state, tuple[Any, ...])
groups = jopt.param_groups(jopt.adamw, {jopt.norms_and_biases: {"weight_decay": 0.0}}, lr=1e-3)
assert_type(groups, jopt.Groups)
params, groups_state = groups.step(params, groups.init(params), params)
skipping = jopt.skip_nonfinite(tx)
params, skip_state = skipping.step(params, skipping.init(params), params, value=1.0)
assert_type(skip_state.skipped, jax.Array)
scaler = jopt.loss_scale()
assert_type(scaler, jopt.LossScale)
params, state, scale = scaler.step(tx, params, state, params, scaler.init())
assert_type(params, dict[str, jax.Array])
assert_type(state, jopt.State)
assert_type(scale, jopt.ScaleState)
monitor = jopt.monitor(tx)
params, monitored = monitor.step(params, monitor.init(params), params)
assert_type(jopt.health_report(monitored.health, params), jopt.HealthReport)
average = jopt.ema(0.99)
assert_type(average.update(params, average.init(params)), jopt.AverageState)
assert_type(jopt.pack(params), jopt.Packed)
assert_type(jopt.reduce_lr_on_plateau(), jopt.Plateau)
solver = jopt.lbfgs(line_search_fn="strong_wolfe")


def value_and_grad(p: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    return (p["w"] ** 2).sum(), {name: 2 * x for name, x in p.items()}


params, solver_state, loss = solver.step(value_and_grad, solver.init(params), params)
assert_type(params, dict[str, jax.Array])
assert_type(loss, jax.Array)
assert_type(jopt.explain(tx, params), jopt.Explanation)
for make in (jopt.sgd, jopt.adam, jopt.rmsprop, jopt.muon, jopt.sparse_adam, jopt.mars):
    assert_type(make(lr=0.1), jopt.Transform)
mesh = jax.make_mesh((1,), ("data",))  # pyright: ignore[reportUnknownMemberType]
sharded = jopt.shard_state(tx, params, mesh)
assert_type(sharded, jopt.Sharded)
params, _ = sharded.step(params, sharded.init(params), params)
assert_type(params, dict[str, jax.Array])

# --- in PyTorch

model = torch.nn.Linear(3, 1)
optimizer = optim.AdamW(model.parameters(), lr=1e-3, max_norm=1.0, ema=0.99)
assert_type(optimizer, optim.AdamW)
as_torchs: torch.optim.AdamW = optimizer
optimizer.zero_grad()
assert_type(optimizer.step(), None)


def closure() -> float:
    return 0.5


assert_type(optimizer.step(closure), float)
assert_type(optimizer.grad_norm, torch.Tensor | None)
assert_type(optimizer.skipped, bool)
optimizer.max_norm = 2.0
assert_type(amp.GradScaler("cpu"), amp.GradScaler)
wrapped = interop.wrap(optax.adam(1e-3), model.named_parameters())
assert_type(wrapped, interop.WrappedOptimizer)
moved, arrays, moved_state = interop.optimizer_to_jax(optimizer, model)
assert_type(arrays, dict[str, jax.Array])
interop.optimizer_to_torch(moved, arrays, moved_state, model, optimizer)
array: jax.Array = interop.to_jax(torch.ones(3))
tensor: torch.Tensor = interop.to_torch(array)
checkpoint = interop.Checkpoint.from_torch(model, optimizer)
assert_type(checkpoint.step, int | None)
interop.save_checkpoint(checkpoint, "run.pt")
assert_type(interop.load_checkpoint("run.pt"), interop.Checkpoint)
