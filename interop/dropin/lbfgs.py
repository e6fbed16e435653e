"""torch's LBFGS with another loop around torch's closure: the decisions are `jopt.lbfgs`'s, the vectors stay torch's.

An iteration reads each vector of the history twice: it waits for memory, and torch's dot products and sums keep both
processors at that, where XLA on CPU takes products with one vector on one thread. So nothing is compiled: `judge` and
`begin` are called with plain numbers, and what is saved are torch's copies of gradients and parameters.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import jopt
from interop import _compat
from interop.dropin import options
from interop.dropin.groups import as_number, lacks, parameter_name
from interop.dropin.host import undynamo
from interop.dropin.state import check_number, check_slot
from interop.dropin.step import OfTorch
from interop.memory import check_parameter
from interop.memory.tensors import DTYPES
from interop.memory.values import to_jax
from interop.modules import JaxLeaf
from jopt.lbfgs import LEAST_CURVATURE, LBFGSState
from jopt.line_search import DONE, START, Settings, begin, initial_run, judge

ITERATED = (
    "d",
    "t",
    "old_dirs",
    "old_stps",
    "ro",
    "H_diag",
    "prev_flat_grad",
)  # what an iteration leaves for the next one to read


class LBFGS(OfTorch, torch.optim.LBFGS):
    """`torch.optim.LBFGS`, with fewer passes over memory and the same bits.

    Parameters of bfloat16 and float16 are searched in float32. A copy and an unpickled one can step, unlike torch's.
    """

    @classmethod
    def known_options(cls) -> frozenset[str]:
        return frozenset({"lr", *(field.name for field in dataclasses.fields(Settings))})

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
            RuntimeError: another line_search_fn than None and 'strong_wolfe'.
            TypeError, ValueError: a parameter that cannot be stepped, a state that a step cannot go on
                from; said before the closure is called.
            KeyError: an argument that the group lacks.
        """
        return undynamo(_step)(self, torch.enable_grad()(closure))


def _step(optimizer: LBFGS, closure: Callable[[], Any]) -> Any:
    if len(optimizer.param_groups) != 1:
        raise AssertionError(f"Expected exactly one param_group, but got {len(optimizer.param_groups)}")
    options.check_groups(type(optimizer), optimizer.param_groups)
    group, place = optimizer.param_groups[0], "param_groups[0]"
    try:
        settings, place = _settings(group), "param_groups[0]['lr']"
        as_number(group["lr"])
    except KeyError as error:
        raise lacks(optimizer, 0, error.args[0]) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{place}: {error}") from error
    for p in optimizer._params:
        check_parameter(parameter_name(optimizer, 0, p), p)
    _check_state(optimizer, settings)

    first = closure()
    if not optimizer._params:
        return first
    grad = _gradient(optimizer)
    step = _Step(optimizer, settings, grad.dtype)
    try:
        step.take(first, grad)
        while step.run.phase != DONE:
            step.move()
            step.take(closure(), _gradient(optimizer))
        if step.run.unseen:
            step.move()
    finally:
        step.write()
    return first


def _check_state(optimizer: LBFGS, settings: Settings) -> None:
    """Raise, before the closure is called, for a state that a step cannot go on from."""
    params = optimizer._params
    if not params or not (state := optimizer.state.get(params[0])):
        return
    name, device = parameter_name(optimizer, 0, params[0]), check_parameter("", params[0])
    n = sum(p.numel() * (2 if p.is_complex() else 1) for p in params)
    for key in ("n_iter", "func_evals"):
        check_number(name, key, state.get(key, 0))
    if state.get("n_iter", 0):
        for key in ITERATED:
            if state.get(key) is None:
                found = sorted(name for name, x in state.items() if x is not None)
                raise TypeError(
                    f"{name}: LBFGS reads its state {key!r}, found {found}; load the state_dict of an LBFGS, or clear "
                    "the state, which then begins anew"
                )
    for key, value in state.items():
        if value is None:
            continue
        if key in ("t", "H_diag", "prev_loss"):
            check_number(name, key, value)
        elif key in ("d", "prev_flat_grad"):
            check_slot(device, name, key, value, (n,))
        elif key in ("old_dirs", "old_stps", "ro"):
            if not isinstance(value, list | tuple):
                raise TypeError(f"{name}: expected a list for its state {key!r}, found {type(value).__name__}")
            for i, x in enumerate(value):
                if key == "ro":
                    check_number(name, f"ro[{i}]", x)
                else:
                    check_slot(device, name, f"{key}[{i}]", x, (n,))
    _stored_pairs(settings, state)


def _settings(group: Mapping[str, Any]) -> Settings:
    """A group's arguments but lr; torch before 2.14 has no `maximize`."""
    given: dict[str, Any] = {"maximize": False} | dict(group)
    return Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings)})


def _gradient(optimizer: LBFGS) -> Tensor:
    """A copy, of what is minimized: the closure's gradients change with the next call."""
    grad = optimizer._gather_flat_grad()
    return grad if grad.dtype is torch.float64 else grad.float()


def _dot(x: Tensor, y: Tensor) -> float:
    return x.dot(y).item()


def _norm(x: Tensor) -> float:
    """max |x|, without a tensor of |x|."""
    low, high = (float(bound) for bound in torch.aminmax(x))
    return max(-low, high)


class _Step:
    """A step under way: the vectors of torch's state, and the numbers of `jopt.lbfgs`."""

    def __init__(self, optimizer: LBFGS, settings: Settings, dtype: torch.dtype):
        self.optimizer, self.settings = optimizer, settings
        self.searches = settings.line_search_fn is not None
        self.state: dict[str, Any] = optimizer.state[optimizer._params[0]]
        number = self.number = DTYPES[dtype].type

        def vector(x: Any) -> Any:
            return None if x is None else x.detach().to(dtype)

        pairs = _stored_pairs(settings, self.state)
        self.pairs = [(vector(y), vector(s), number(float(ro))) for y, s, ro in pairs]
        self.d, self.prev_flat_grad = (vector(self.state.get(name)) for name in ("d", "prev_flat_grad"))
        self.H_diag = number(float(self.state.get("H_diag", 1)))
        t, prev_loss = (float(self.state.get(name) or 0) for name in ("t", "prev_loss"))
        self.run = initial_run(not self.state.get("n_iter"), t, prev_loss)
        self.bracket_g: list[Any] = [None, None]
        self.start: list[Tensor] = []  # the parameters where the line search began

    def take(self, value: Any, grad: Tensor) -> None:
        """Take in an evaluation: if it ends the iteration, go to the point found, and begin the next one there."""
        loss = -float(value) if self.settings.maximize else float(value)
        with np.errstate(all="ignore"):
            slope = _dot(grad, self.d) if self.searches and self.run.phase != START else 0.0
            numbers = loss, self.number(slope), self.number(_norm(grad))
            self.run, verdict = judge(_Numbers, self.settings, self.run, *numbers)
            sources = (*self.bracket_g, grad, self.prev_flat_grad)
            self.bracket_g = [sources[i] for i in verdict.bracket_g]
            taken = float(self.run.bracket[self.run.low])
            if self.searches and verdict.moves:
                self._place(taken)
            if verdict.begins:
                self._begin(taken)

    def move(self) -> None:
        """Move the parameters to where the next evaluation is wanted."""
        t = float(self.run.t)
        if self.searches:
            self._place(t)
        else:
            self.optimizer._add_grad(t, self.d)

    def _place(self, t: float) -> None:
        """At start + t * d, in one pass; whatever the closure did to the parameters is undone, as in torch."""
        ends = 0
        for p, x in zip(self.optimizer._params, self.start, strict=True):
            p, x = (torch.view_as_real(z) if z.is_complex() else z for z in (p, x))
            begins, ends = ends, ends + p.numel()
            torch.add(x, self.d[begins:ends].view_as(p), alpha=t, out=p)

    def _begin(self, taken: float) -> None:
        """Begin an iteration: remember the pair that the last one made, unless there was none, and find d."""
        run, grad, number = self.run, self.bracket_g[self.run.low], self.number
        total = 1.0
        if run.fresh:
            total = grad.abs().sum().item()
            self.pairs, self.H_diag = [], number(1)
        else:
            y, s = grad - self.prev_flat_grad, self.d * taken
            ys = number(_dot(y, s))
            if ys > LEAST_CURVATURE:
                self.pairs = [*self.pairs, (y, s, 1 / ys)][-self.settings.history_size :]
                self.H_diag = ys / number(_dot(y, y))
        self.d, self.prev_flat_grad = self._direction(grad), grad
        lr, found = float(self.optimizer.param_groups[0]["lr"]), (total, _dot(grad, self.d), _norm(self.d))
        self.run = begin(_Numbers, self.settings, run, lr, *map(number, found))
        if _compat.SEARCH_EVALUATIONS is not None:
            self.run = self.run._replace(max_ls=_compat.SEARCH_EVALUATIONS)
        self.bracket_g = [grad, grad]
        if self.searches:
            self.start = self.optimizer._clone_param()

    def _direction(self, grad: Tensor) -> Tensor:
        """-H grad by the two loops over the pairs, in torch's order and roundings: from q = -grad, newest pair first,

            a_i = ro_i s_i . q,  q -= a_i y_i   and, from r = H_diag q, back,   r += (a_i - ro_i y_i . r) s_i

        with -q and -a in place of q and a, which spares a pass.
        """
        d, q, a = torch.empty_like(grad), grad, []
        for y, s, ro in reversed(self.pairs):
            a.append(self.number(_dot(s, q)) * ro)
            q = torch.sub(q, y, alpha=float(a[-1]), out=d)
        torch.mul(q, -float(self.H_diag), out=d)
        for y, s, ro in self.pairs:
            d.add_(s, alpha=-float(a.pop() + self.number(_dot(y, d)) * ro))
        return d

    def write(self) -> None:
        """Write torch's state; before the first iteration that is its counts only."""
        run, state = self.run, self.state
        counts = {name: state.get(name, 0) + x for name, x in (("func_evals", run.evals), ("n_iter", run.n_iter))}
        vectors = self.pairs, self.d, self.H_diag, self.prev_flat_grad
        state.update(
            _torch_state(self.settings, counts, *vectors, float(run.t), float(run.prev_loss)) if run.n_iter else counts
        )


class _Numbers:
    """What `judge` and `begin` need, for single numbers, which are rounded as torch's.

    Losses and lr are Python numbers. What comes of vectors is NumPy's in their type, and so is any result of the two
    together, as in torch with a number and a 0-d tensor.
    """

    minimum, maximum, logical_not = min, max, operator.not_

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        return x if condition else y

    @staticmethod
    def sqrt(x: Any) -> Any:
        return type(x)(torch.tensor(x).sqrt().item())  # NumPy's is the nearest number, torch's not always

    @staticmethod
    def divide(x: Any, y: Any) -> Any:
        """A loss divided by a length; torch divides a number by a tensor as number * (1 / tensor)."""
        if isinstance(y, np.floating):
            return x * (1 / y)
        return x / y if y else float(np.divide(x, y))


def _stored_pairs(settings: Settings, state: Mapping[str, Any]) -> list[tuple[Tensor, Tensor, Any]]:
    """The (y, s, ro) of torch's state that are still used, oldest first."""
    columns = [state.get(name) or [] for name in ("old_dirs", "old_stps", "ro")]
    if len({len(x) for x in columns}) > 1:
        found = ", ".join(str(len(x)) for x in columns)
        raise ValueError(f"state: expected old_dirs, old_stps and ro of one length, found {found}")
    pairs: list[Any] = list(zip(*columns, strict=True))
    return pairs[-settings.history_size :]


def _torch_state(
    settings: Settings,
    counts: dict[str, int],
    pairs: Sequence[tuple[Tensor, Tensor, Any]],
    d: Tensor,
    H_diag: Any,
    prev_flat_grad: Tensor,
    t: float,
    prev_loss: float,
) -> dict[str, Any]:
    """torch's state from the first iteration on."""

    def tensor(x: Any) -> Tensor:
        return torch.tensor(float(x), dtype=d.dtype)

    later = counts["n_iter"] > 1
    return {
        **counts,
        **({"al": [None] * settings.history_size} if later else {}),  # torch's working memory
        "d": d,
        "t": t if later and settings.line_search_fn is None else tensor(t),
        "old_dirs": [y for y, _, _ in pairs],
        "old_stps": [s for _, s, _ in pairs],
        "ro": [tensor(ro) for _, _, ro in pairs],
        "H_diag": tensor(H_diag) if pairs else 1,
        "prev_flat_grad": prev_flat_grad,
        "prev_loss": prev_loss,
    }


# --- a run that moves --------------------------------------------------------------------------------


def run_to_jax(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, JaxLeaf],
    params: dict[str, jax.Array],
    step: int | None,
    arguments: dict[str, Any],
) -> tuple[Any, LBFGSState]:
    """`jopt.lbfgs` as the optimizer has it, and its state; vectors have the parameters in JAX's order."""
    group = optimizer.param_groups[0]
    given: dict[str, Any] = dataclasses.asdict(_settings(group)) | {"lr": group["lr"]}
    given = {k: x.item() if isinstance(x, Tensor) else x for k, x in given.items()}
    solver = jopt.lbfgs(**given | arguments)
    state, x = solver.init(params), optimizer.state.get(group["params"][0], {})
    state = state._replace(count=np.int32(step or 0))
    dtype, order = state.d.dtype, _order(optimizer, names)

    def vector(name: str, x: Tensor) -> np.ndarray:
        if x.shape != order.shape:
            raise ValueError(f"the state {name!r}: expected shape {order.shape}, found {tuple(x.shape)}")
        return to_jax(x.detach()).astype(dtype)[order]

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
    solver: Any, x: LBFGSState, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, JaxLeaf]
) -> dict[str, Any]:
    """torch's state."""
    back = np.argsort(_order(optimizer, names))

    def vector(x: Any) -> Tensor:
        return torch.from_numpy(np.asarray(x)[back]).to(next(iter(names)).device)

    counts = {"func_evals": int(x.func_evals), "n_iter": int(x.n_iter)}
    if not counts["n_iter"]:
        return counts if counts["func_evals"] else {}
    rows, stored = solver.settings.history_size + 1, int(x.stored)
    indices = [i % rows for i in range(max(0, stored - rows + 1), stored)]
    pairs = [(vector(x.old_dirs[i]), vector(x.old_stps[i]), x.ro[i]) for i in indices]
    d, prev_flat_grad = vector(x.d), vector(x.prev_flat_grad)
    return _torch_state(solver.settings, counts, pairs, d, x.H_diag, prev_flat_grad, float(x.t), float(x.prev_loss))


def _order(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, JaxLeaf]) -> np.ndarray:
    """Where in torch's flat vector each number of JAX's lies."""
    places, start = {}, 0
    for p in optimizer.param_groups[0]["params"]:
        parts = 2 if p.is_complex() else 1
        place = torch.arange(start, start + p.numel() * parts).view(*p.shape, parts)
        leaf, start = names[p], start + p.numel() * parts
        turned = place if leaf.axes is None else place.permute(*leaf.axes, -1)
        places[leaf.name] = turned.reshape(-1).numpy()
    return np.concatenate(jax.tree.leaves(places))
