"""torch's LBFGS with its arithmetic compiled: the closure stays torch's, `jopt.advance` runs between its calls.

torch's state is read when a step begins and written when it ends. The history, by far its largest part, lives in two
JAX buffers, which torch's lists `old_dirs` and `old_stps` see row by row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import jopt
from interop import dlpack
from interop.modules import Leaf
from interop.optimizer import KeepsWideState, check_process, parameter_name, undynamo
from interop.program import own_settings, pause_openmp
from interop.program import run as run_program
from jopt.lbfgs import DONE, START, LBFGSState, Run, Settings, advance, initial_run, initial_state

FIRST_CAPACITY = 8  # pairs; the history grows by doubling, as torch's grows by the pair


class LBFGS(KeepsWideState, torch.optim.LBFGS):
    """`torch.optim.LBFGS`, whose directions and line search are compiled (`jopt.lbfgs`).

    Parameters of bfloat16 and float16 are searched in float32. A copy and an unpickled one can step, unlike torch's.
    """

    _history: _History | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._params = self.param_groups[0]["params"]
        self._numel_cache = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The loss of the first evaluation.

        Raises:
            RuntimeError: a forked child process, or another line_search_fn than None and 'strong_wolfe'.
            TypeError: a parameter that cannot be stepped; said before anything changes.
        """
        return undynamo(_step)(self, torch.enable_grad()(closure))


def _step(optimizer: LBFGS, closure: Callable[[], Any]) -> Any:
    check_process()
    if len(optimizer.param_groups) != 1:
        raise AssertionError(f"Expected exactly one param_group, but got {len(optimizer.param_groups)}")
    group = optimizer.param_groups[0]
    settings = Settings(**{field.name: group[field.name] for field in dataclasses.fields(Settings)})
    for p in optimizer._params:
        dlpack.check_parameter(parameter_name(optimizer, 0, p), p)
    search = settings.line_search_fn is not None

    first = closure()
    loss, grad = float(first), _gradient(optimizer)
    history = optimizer._history
    if history is None or not history.serves(settings, grad, optimizer):
        history = optimizer._history = _History(settings, grad, optimizer)
    state, run = history.read(optimizer)
    try:
        while True:
            before = state.d
            state, run, taken, moves = history.advance(state, run, float(group["lr"]), loss, grad)
            if moves and search:
                optimizer._add_grad(float(taken), _tensor(before))
            if run.unseen:
                optimizer._add_grad(float(state.t), _tensor(state.d))
            if run.phase == DONE:
                return first
            start = optimizer._clone_param() if search else None
            optimizer._add_grad(float(state.t), _tensor(state.d))
            loss, grad = float(closure()), _gradient(optimizer)
            if start is not None:
                optimizer._set_param(start)
    finally:
        history.write(optimizer, state, begun=bool(run.n_iter))


def _gradient(optimizer: LBFGS) -> Tensor:
    grad = optimizer._gather_flat_grad()
    return grad if grad.dtype is torch.float64 else grad.float()


def _tensor(x: Any) -> Tensor:
    return dlpack.to_torch(x, copy=None)


class _History:
    """The pairs, and the program for their number."""

    def __init__(self, settings: Settings, grad: Tensor, optimizer: LBFGS):
        self.settings, self.n, self.dtype = settings, grad.numel(), grad.dtype
        pairs = _stored_pairs(settings, optimizer.state[optimizer._params[0]])
        self._allocate(max(FIRST_CAPACITY, len(pairs)), pairs)

    def _allocate(self, capacity: int, pairs: list[tuple[Tensor, Tensor, Any]]) -> None:
        self.capacity = min(capacity, self.settings.history_size)
        self.buffers = [dlpack.Buffer((self._rows, self.n), self._numpy) for _ in range(2)]
        self.stored = len(pairs)
        self.ro = np.zeros(self._rows, self._numpy)
        for i, (y, s, ro) in enumerate(pairs):
            for j, x in enumerate((y, s)):
                self._row(j, i).copy_(x)
            self.ro[i] = float(ro)
        self.sy = self._ring(1) @ self._ring(0).T
        self.lists: list[list[Tensor]] = []
        self.program = _compile(dataclasses.replace(self.settings, history_size=self.capacity), self.n, self._numpy)

    @property
    def _numpy(self) -> np.dtype:
        return dlpack.DTYPES[self.dtype]

    @property
    def _rows(self) -> int:
        return self.capacity + 1

    def _ring(self, buffer: int) -> np.ndarray:
        return self.buffers[buffer].view(self.dtype, (self._rows, self.n)).numpy()

    def _row(self, buffer: int, index: int) -> Tensor:
        offset = index * self.n * self._numpy.itemsize
        return self.buffers[buffer].view(self.dtype, (self.n,), offset)

    def _pairs(self) -> list[tuple[Tensor, Tensor, float]]:
        """From the oldest to the newest."""
        return [(self._row(0, i), self._row(1, i), float(self.ro[i])) for i in self._indices()]

    def _indices(self) -> list[int]:
        return [i % self._rows for i in range(max(0, self.stored - self.capacity), self.stored)]

    def serves(self, settings: Settings, grad: Tensor, optimizer: LBFGS) -> bool:
        """Whether this still is the state's history."""
        state = optimizer.state[optimizer._params[0]]
        found = [state.get("old_dirs") or [], state.get("old_stps") or []]
        return (
            (settings, grad.numel(), grad.dtype) == (self.settings, self.n, self.dtype)
            and len(self.lists) == 2
            and all(a is b for a, b in zip(found, self.lists, strict=True))
            and [list(map(_identity, x)) for x in found] == self.rows
            and len(state.get("ro") or []) == len(self.lists[0])
        )

    def read(self, optimizer: LBFGS) -> tuple[LBFGSState, Run]:
        state = optimizer.state[optimizer._params[0]]
        state.setdefault("func_evals", 0)
        state.setdefault("n_iter", 0)

        def number(name: str) -> np.ndarray:
            return np.array(float(state.get(name) or 0), self._numpy)

        def vector(name: str) -> np.ndarray:
            x = state.get(name)
            return np.zeros(self.n, self._numpy) if x is None else x.detach().to(self.dtype).numpy().copy()

        for index, ro in zip(self._indices(), state.get("ro") or [], strict=True):
            self.ro[index] = float(ro)
        values: dict[str, Any] = dict(
            count=np.int32(0),
            n_iter=np.int32(state["n_iter"]),
            func_evals=np.int32(state["func_evals"]),
            d=vector("d"),
            t=number("t"),
            old_dirs=self.buffers[0].array,
            old_stps=self.buffers[1].array,
            ro=self.ro,
            sy=self.sy,
            stored=np.int32(self.stored),
            H_diag=number("H_diag"),
            prev_flat_grad=vector("prev_flat_grad"),
            prev_loss=number("prev_loss"),
        )
        return LBFGSState(**values), _first_run(self.settings, self.n, self._numpy)

    def advance(self, state: LBFGSState, run: Run, lr: float, loss: float, grad: Tensor) -> Any:
        pause_openmp()
        if self.stored == self.capacity < self.settings.history_size:
            self._allocate(2 * self.capacity, self._pairs())
            state = state._replace(ro=self.ro, sy=self.sy)
        new = [np.array(x, self._numpy) for x in (lr, loss)]
        gradient = dlpack.host_array(grad, self._numpy)
        state, run, d, taken, moves = run_program(
            self.program, self.buffers, _rest(state), run, state.d, *new, gradient
        )
        self.stored, self.ro, self.sy = int(state.stored), np.array(state.ro), np.array(state.sy)
        return state._replace(d=d), run, taken, bool(moves)

    def write(self, optimizer: LBFGS, x: LBFGSState, *, begun: bool) -> None:
        state = optimizer.state[optimizer._params[0]]
        state.update(_torch_state(self.settings, x, self._pairs() if begun else None))
        if begun:
            self.lists = [state["old_dirs"], state["old_stps"]]
            self.rows = [list(map(_identity, rows)) for rows in self.lists]


def _stored_pairs(settings: Settings, state: Mapping[str, Any]) -> list[tuple[Tensor, Tensor, Any]]:
    """(y, s, ro) of torch's state, from the oldest that counts to the newest."""
    columns = [state.get(name) or [] for name in ("old_dirs", "old_stps", "ro")]
    if len({len(x) for x in columns}) > 1:
        found = ", ".join(str(len(x)) for x in columns)
        raise ValueError(f"state: expected old_dirs, old_stps and ro of one length, found {found}")
    pairs: list[Any] = list(zip(*columns, strict=True))
    return pairs[-settings.history_size :]


def _torch_state(settings: Settings, x: LBFGSState, pairs: list[tuple[Tensor, Tensor, float]] | None) -> dict[str, Any]:
    """torch's state; before the first iteration, without pairs, it counts only."""
    counts = {"func_evals": int(x.func_evals), "n_iter": int(x.n_iter)}
    if pairs is None:
        return counts
    later = counts["n_iter"] > 1
    return counts | {
        **({"al": [None] * settings.history_size} if later else {}),  # torch's working memory
        "d": _own(x.d),
        "t": float(x.t) if later and settings.line_search_fn is None else _own(x.t),
        "old_dirs": [y for y, _, _ in pairs],
        "old_stps": [s for _, s, _ in pairs],
        "ro": [torch.tensor(ro, dtype=y.dtype) for y, _, ro in pairs],
        "H_diag": _own(x.H_diag) if pairs else 1,
        "prev_flat_grad": _own(x.prev_flat_grad),
        "prev_loss": float(x.prev_loss),
    }


# --- a run that moves --------------------------------------------------------------------------------


def run_to_jax(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, Leaf],
    params: dict[str, jax.Array],
    step: int | None,
    arguments: dict[str, Any],
) -> tuple[Any, LBFGSState]:
    """`jopt.lbfgs` as the optimizer has it, and its state; vectors have the parameters in JAX's order."""
    group = optimizer.param_groups[0]
    options: dict[str, Any] = {field.name: group[field.name] for field in dataclasses.fields(Settings)} | {
        "lr": group["lr"]
    }
    options = {k: x.item() if isinstance(x, Tensor) else x for k, x in options.items()}
    solver = jopt.lbfgs(**options | arguments)
    state, x = solver.init(params), optimizer.state.get(group["params"][0], {})
    state = state._replace(count=np.int32(step or 0))
    dtype, order = state.d.dtype, _order(optimizer, names)

    def vector(name: str, x: Tensor) -> np.ndarray:
        if x.shape != order.shape:
            raise ValueError(f"the state {name!r}: expected shape {order.shape}, found {tuple(x.shape)}")
        return dlpack.to_jax(x.detach()).astype(dtype)[order]

    counts = {name: np.int32(x.get(name, 0)) for name in ("n_iter", "func_evals")}
    found = {name: vector(name, x[name]) for name in ("d", "prev_flat_grad") if x.get(name) is not None}
    found |= {name: np.array(float(x[name]), dtype) for name in ("t", "H_diag", "prev_loss") if x.get(name) is not None}
    pairs = _stored_pairs(solver.settings, x)
    y, s, ro = np.array(state.old_dirs), np.array(state.old_stps), np.array(state.ro)
    for i, pair in enumerate(pairs):
        y[i], s[i], ro[i] = vector("old_dirs", pair[0]), vector("old_stps", pair[1]), float(pair[2])
    rings = {"old_dirs": y, "old_stps": s, "ro": ro, "sy": s @ y.T, "stored": np.int32(len(pairs))}
    state = state._replace(**counts, **found, **rings)
    return solver, jax.tree.map(jnp.asarray, state)


def run_to_torch(
    solver: Any, x: LBFGSState, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, Leaf]
) -> dict[str, Any]:
    """torch's state."""
    back = np.argsort(_order(optimizer, names))

    def vector(x: Any) -> Any:
        return np.asarray(x)[back]

    rows, stored = solver.settings.history_size + 1, int(x.stored)
    indices = [i % rows for i in range(max(0, stored - rows + 1), stored)]
    pairs = [(_own(vector(x.old_dirs[i])), _own(vector(x.old_stps[i])), float(x.ro[i])) for i in indices]
    if not int(x.func_evals):
        return {}
    x = x._replace(d=vector(x.d), prev_flat_grad=vector(x.prev_flat_grad))
    return _torch_state(solver.settings, x, pairs if int(x.n_iter) else None)


def _order(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, Leaf]) -> np.ndarray:
    """Where in torch's flat vector each number of JAX's lies."""
    places, start = {}, 0
    for p in optimizer.param_groups[0]["params"]:
        parts = 2 if p.is_complex() else 1
        place = torch.arange(start, start + p.numel() * parts).view(*p.shape, parts)
        leaf, start = names[p], start + p.numel() * parts
        turned = place if leaf.axes is None else place.permute(*leaf.axes, -1)
        places[leaf.name] = turned.reshape(-1).numpy()
    return np.concatenate(jax.tree.leaves(places))


def _rest(state: LBFGSState) -> LBFGSState:
    """What of the state is donated beside the rings. Not d: the parameters are moved along the last one."""
    none: Any = None
    return state._replace(old_dirs=none, old_stps=none, d=none)


def _identity(row: Tensor) -> tuple[int, int]:
    """A row, and how often torch wrote to it: `sy` is of what it was."""
    return id(row), 0 if row.is_inference() else row._version


def _own(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x))


def _first_run(settings: Settings, n: int, dtype: np.dtype) -> Run:
    with own_settings():
        shapes = jax.eval_shape(lambda: initial_run(settings, n, dtype))
    return jax.tree.map(lambda x: np.full(x.shape, START, x.dtype), shapes)


@functools.lru_cache(maxsize=64)
def _compile(settings: Settings, n: int, dtype: np.dtype) -> Any:
    def program(rings: list[Any], state: LBFGSState, run: Run, d: Any, lr: Any, loss: Any, grad: Any) -> Any:
        state = state._replace(old_dirs=rings[0], old_stps=rings[1], d=d)
        state, run, taken, moves = advance(settings, state, run, lr, loss, grad)
        return [state.old_dirs, state.old_stps, _rest(state), run, state.d, taken, moves]

    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with own_settings():
        state, run = jax.eval_shape(
            lambda: (initial_state(settings, n, dtype), initial_run(settings, n, dtype)),
        )
        rings = [jax.ShapeDtypeStruct((settings.history_size + 1, n), dtype)] * 2
        scalar = jax.ShapeDtypeStruct((), dtype)
        specs = (rings, _rest(state), run, state.d, scalar, scalar, jax.ShapeDtypeStruct((n,), dtype))
        specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), specs)
        return jax.jit(program, donate_argnums=(0, 1, 2)).lower(*specs).compile()
