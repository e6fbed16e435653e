"""A run as names and arrays, both ways between torch and JAX. It asks no live model and no live optimizer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor

from interop import optim
from interop.dropin import formats
from interop.dropin.options import EXECUTION, check_groups
from interop.memory.values import to_jax, to_torch
from interop.modules import JaxLeaf
from interop.runs.classes import CLASSES, LINE_SEARCHING, TorchClass
from jopt import State, Transform
from jopt.around.groups import Groups, GroupsState
from jopt.lbfgs import LBFGS
from jopt.quantized import ABSMAX, CODES
from jopt.rule import Rule

# The entries of an optimizer's group that do not enter its mathematics.
NO_ARGUMENTS = frozenset({"params", "param_names", "initial_lr", *EXECUTION})


@dataclasses.dataclass
class OptimizerState:
    """An optimizer's state_dict by names.

    Attributes:
      name: torch's class, as "AdamW"; None if the file does not say and the options do not tell.
      groups: torch's param_groups, whose "params" are names.
      state: parameter -> torch's key -> tensor or number. Parameters that were never stepped have no entry.
    """

    name: str | None
    groups: list[dict[str, Any]]
    state: dict[str, dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Its parameters, in the order of its groups."""
        return [name for group in self.groups for name in group["params"]]

    @property
    def steps(self) -> list[float]:
        """The step counts that the state has."""
        return [float(values["step"]) for values in self.state.values() if "step" in values]


def run_to_jax(
    run: OptimizerState,
    params: Mapping[str, Tensor],
    leaves: Mapping[str, JaxLeaf],
    *,
    step: int | None = None,
    scheduled: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[Transform | Groups, dict[str, jax.Array], State | GroupsState]:
    """A torch run as `(tx, params, state)` of jopt, of copies.

    Args:
      run: of a class in `CLASSES`.
      params: the parameters that it holds, by torch's names.
      leaves: what those become in JAX.
      step: `State.count`; by default the largest step of the state.
      scheduled: of each group the arguments that a schedule sets.
      arguments: instead of the groups' own, or beside them.

    Raises:
      TypeError, ValueError, NotImplementedError: see `interop.optimizer_to_jax`.
    """
    cls = CLASSES[str(run.name)]
    check_groups(getattr(optim, cls.name), run.groups)
    if not all(group.get("train_mode", True) for group in run.groups):
        raise ValueError(f"param_groups: {cls.name} holds the averages to evaluate; call optimizer.train() first")
    turned = [leaf.name for leaf in leaves.values() if leaf.axes is not None]
    if turned and cls.looks_at_axes:
        raise ValueError(
            f"layout: {cls.name} looks at the axes of a matrix, and would step {turned[0]!r} otherwise with them in "
            "flax's order; move it in torch's layout"
        )
    arrays = {leaves[name].name: to_jax(leaves[name].to_jax(x.detach())) for name, x in params.items()}
    groups = _groups(run, scheduled or ({},) * len(run.groups))
    count = int(max(run.steps, default=0)) if step is None else step
    parts = []
    for options, members in groups:
        own = {leaves[name].name: name for name in members}
        masked = {name: x if name in own else optax.MaskedNode() for name, x in arrays.items()}
        given = options, dict(arguments or {})
        parts.append(_group_to_jax(cls, *given, run, params, leaves, own, masked, count))
    if len(parts) == 1:
        return parts[0][0], arrays, parts[0][1]
    patterns = [_Names(frozenset(leaves[n].name for n in members), g) for g, (_, members) in enumerate(groups)]
    txs, states = zip(*parts, strict=True)
    return Groups(tuple(patterns[:-1]), txs), arrays, GroupsState(states)


def _groups(run: OptimizerState, scheduled: Iterable[Mapping[str, Any]]) -> list[tuple[dict[str, Any], list[str]]]:
    """The groups' options and parameters; all in one where their options are equal."""
    groups = [
        ({k: v for k, v in group.items() if k not in NO_ARGUMENTS} | dict(own), list(group["params"]))
        for group, own in zip(run.groups, scheduled, strict=True)
    ]
    first = groups[0][0]
    if all(first.keys() == other.keys() and all(other[k] == v for k, v in first.items()) for other, _ in groups[1:]):
        return [(first, [name for _, members in groups for name in members])]
    return groups


def _group_to_jax(
    cls: TorchClass,
    options: dict[str, Any],
    arguments: dict[str, Any],
    run: OptimizerState,
    params: Mapping[str, Tensor],
    leaves: Mapping[str, JaxLeaf],
    own: Mapping[str, str],
    arrays: dict[str, Any],
    step: int,
) -> tuple[Transform, State]:
    """The transformation of a group, and its state. `own`: JAX's name of each of its parameters, and torch's.

    `arrays` are all parameters; those of other groups are masked.
    """
    known = inspect.signature(cls.make).parameters
    given = {k: _number(v) for k, v in options.items() if k in known} | arguments
    states = {new: run.state.get(name, {}) for new, name in own.items()}
    if any(_is_wider(x, params[own[new]]) for new, state in states.items() for x in state.values()):
        given.setdefault("state_dtype", jnp.float32)
    tx = cls.make(**given)
    state = tx.init(arrays)
    slots = {slot: dict(tree) for slot, tree in state.slots.items()}
    states = {
        new: _in_order_of_jax(tx.rule, _slots_at(state, new), values, leaves[own[new]], params[own[new]])
        for new, values in states.items()
    }
    for slot, tree in slots.items():
        for new, name in own.items():
            fresh, value = tree[new], states[new].get(slot)
            if fresh is not None and value is not None:
                same = value.shape == params[name].shape and not slot.endswith(CODES)
                value = leaves[name].to_jax(value.detach()) if same else value.detach()
                if tuple(value.shape) != fresh.shape:
                    raise ValueError(
                        f"the state {slot!r} of {new!r}: expected shape {fresh.shape}, found {tuple(value.shape)}"
                    )
                tree[new] = to_jax(value).astype(fresh.dtype)
    scalars = {key: np.array(x) for key, x in state.scalars.items()}
    for key, values in scalars.items():
        if key in tx.rule.shared:
            found = [state[key] for state in run.state.values() if key in state]
            values[()] = float(found[0]) if found else values
            continue
        for i, new in enumerate(in_tree_order(own)):
            if key in states[new]:
                values[i] = float(states[new][key])
            elif key == "step" and not cls.counts:
                values[i] = states[new].get("momentum_buffer") is not None
    return tx, state._replace(
        count=jnp.asarray(step, jnp.int32), slots=slots, scalars={k: jnp.asarray(v) for k, v in scalars.items()}
    )


def _slots_at(state: State, name: str) -> set[str]:
    """Which slots a parameter has."""
    return {slot for slot, tree in state.slots.items() if tree[name] is not None}


def _in_order_of_jax(
    rule: Rule, slots: set[str], values: Mapping[str, Any], leaf: JaxLeaf, p: Tensor
) -> Mapping[str, Any]:
    """A parameter's state of any format in that of these slots, codes in JAX's order.

    Codes that stay are the same, unless their axes are exchanged: a block is of neighbours.
    """
    if formats.has_codes(values) and (leaf.axes is not None or not formats.has_codes(slots)):
        values = formats.adapted(rule, None, p, values)
    if not formats.has_codes(slots) or formats.has_codes(values):
        return values
    signs, found = rule.signs(), {}
    for name, x in values.items():
        if name + CODES in slots:
            found[name + CODES], found[name + ABSMAX] = formats.encode(leaf.to_jax(x), signs[name])
        else:
            found[name] = x
    return found


@dataclasses.dataclass(frozen=True)
class _Names:
    """The pattern of a group: its parameters' names."""

    names: frozenset[str]
    group: int

    def __call__(self, path: str, leaf: Any) -> bool:
        return path in self.names

    @property
    def __name__(self) -> str:
        return f"param_groups[{self.group}]"


def run_to_torch(
    name: str,
    tx: Any,
    arrays: Mapping[str, Any],
    state: Any,
    groups: Sequence[Sequence[str]],
    params: Mapping[str, Tensor],
    leaves: Mapping[str, JaxLeaf],
) -> dict[str, dict[str, Any]]:
    """torch's state by names, in tensors of its own; empty for a parameter that was never stepped.

    Args:
      name: torch's class, one in `CLASSES`.
      tx, arrays, state: the run in JAX.
      groups: torch's names of the parameters of each group.
      params: tensors of their shapes.
      leaves: what they are called in JAX.

    Raises:
      TypeError, ValueError: another optimizer, or a state that is not one of `tx.init(arrays)`.
    """
    check_state(tx, arrays, state)
    found: dict[str, dict[str, Any]] = {}
    for one, part, members in parts(name, tx, state, groups):
        order = in_tree_order(leaves[n].name for n in members)
        for n in members:
            found[n] = _state_of(CLASSES[name], one.rule, part, params[n], leaves[n], order.index(leaves[n].name))
    return found


def _state_of(cls: TorchClass, rule: Rule, state: State, p: Tensor, leaf: JaxLeaf, i: int) -> dict[str, Any]:
    """torch's state of a parameter, the i-th of its group."""
    scalars = {key: float(x[i] if x.ndim else x) for key, x in state.scalars.items()}
    if scalars.get("step", 1) == 0 and not cls.keeps_unstepped:
        return {}
    kept = {key: int(x) if cls.counts_in_integers else torch.tensor(x) for key, x in scalars.items()}
    found = {slot: to_torch(tree[leaf.name]) for slot, tree in state.slots.items() if tree[leaf.name] is not None}
    turned = leaf.axes is not None and formats.has_codes(found)
    if turned:
        found = formats.adapted(rule, None, p.new_empty(leaf.shape(p), device="meta"), found)
    slots = {key: leaf.to_torch(x).contiguous() if x.shape == leaf.shape(p) else x for key, x in found.items()}
    if turned:
        slots = formats.adapted(rule, "int8", p, slots)
    if not p.is_meta:
        slots = {key: x.to(p.device) for key, x in slots.items()}
    return {key: x for key, x in kept.items() if key != "step" or cls.counts} | slots


def parts(name: str, tx: Any, state: Any, groups: Sequence[Sequence[Any]]) -> list[tuple[Any, Any, list[Any]]]:
    """What steps each group of torch's, or all of them: its transformation, its state and its members.

    Raises:
      TypeError, ValueError: they are not as many, or step another class.
    """
    if isinstance(tx, Groups):
        txs, states = tx.transforms, state.groups if isinstance(state, GroupsState) else ()
        members = [list(group) for group in groups]
        if not len(txs) == len(states) == len(members):
            raise ValueError(f"tx: expected one of {len(members)} groups, as the optimizer's, found {len(txs)}")
    else:
        txs, states, members = [tx], [state], [[x for group in groups for x in group]]
    for one in txs:
        found = LINE_SEARCHING if isinstance(one, LBFGS) else type(getattr(one, "rule", one)).__name__
        expected = LINE_SEARCHING if name == LINE_SEARCHING else CLASSES[name].rule.__name__
        if found != expected:
            raise TypeError(f"tx: expected one that steps {expected}, as {name}, found {found}")
    return list(zip(txs, states, members, strict=True))


def check_state(tx: Any, params: Mapping[str, Any], state: Any) -> None:
    """Raise ValueError unless the state is of the structure, shapes and types that tx.init(params) has."""
    expected, treedef = jax.tree_util.tree_flatten_with_path(jax.eval_shape(tx.init, params))
    found = jax.tree.structure(state)
    if found != treedef:
        raise ValueError(f"state: expected the structure of tx.init(params), {treedef}, found {found}")
    for (path, spec), x in zip(expected, jax.tree.leaves(state), strict=True):
        if (spec.shape, spec.dtype) != (np.shape(x), x.dtype):
            raise ValueError(
                f"state{jax.tree_util.keystr(path)}: expected {spec.dtype} of shape {spec.shape}, found {x.dtype} of "
                f"shape {np.shape(x)}"
            )


def in_tree_order(names: Iterable[str]) -> list[str]:
    """The names in the order of a tree's leaves."""
    return list(jax.tree.leaves({name: name for name in names}))


def _number(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return tuple(map(_number, x))
    return x.item() if isinstance(x, Tensor) else x


def _is_wider(x: Any, p: Tensor) -> bool:
    return (
        isinstance(x, Tensor) and x.dim() > 0 and x.dtype == torch.float32 and p.dtype in (torch.bfloat16, torch.half)
    )
